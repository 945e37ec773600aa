"""Data and metric of each task."""

from autopeft.tasks.prepare import prepare
from autopeft.tasks.registry import TASKS, make_task

__all__ = ["TASKS", "make_task", "prepare"]
