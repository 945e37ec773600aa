"""Automated adapter search."""
