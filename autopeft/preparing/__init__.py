"""Reads and checks a search before any training: rows, prices, memory, workers."""
