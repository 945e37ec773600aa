"""The search space: what can be tried on one model."""
