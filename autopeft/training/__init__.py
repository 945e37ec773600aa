"""Trains and measures one candidate; knows nothing of searching."""
