"""Compares adapters that were trained elsewhere, and re-judges recorded tables of scores."""
