"""Turns a finished or interrupted search into files and terminal tables."""
