"""Data and metric of each task."""

from autopeft.tasks.load_data import load_data
from autopeft.tasks.registry import TASKS, make_task

__all__ = ["TASKS", "load_data", "make_task"]
