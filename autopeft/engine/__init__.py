"""Runs jobs on workers, within the budget."""
