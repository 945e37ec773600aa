"""Samplers: which candidate to try next."""
