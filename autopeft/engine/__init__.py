"""Runs trials on workers; the only room that knows ray (in `tune.py` alone)."""
