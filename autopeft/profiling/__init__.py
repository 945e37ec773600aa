"""Measures what candidates cost on one model, before any training."""
