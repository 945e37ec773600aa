"""Fixtures: tiny data made in memory."""

from training_samples import classification_data  # noqa: F401
