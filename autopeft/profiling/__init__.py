"""Measure what candidates cost on one model, before any training."""
