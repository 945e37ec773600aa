"""The tasks by name. Light: a task's module is imported when the task is used."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from autopeft.errors import SettingsError

if TYPE_CHECKING:
    from autopeft.settings import SearchSettings
    from autopeft.tasks.base import Task

TASKS: Mapping[str, str] = {
    "text-classification": "autopeft.tasks.text_classification:TextClassification",
    "causal-lm": "autopeft.tasks.causal_lm:CausalLM",
}
"""Task name -> its class as `module:name`. The first one is the default."""


def check_task(name: str | None) -> str:
    """Return the name of a task; None stands for the default.

    Raises:
        SettingsError: if there is no such task.
    """
    if name is None:
        return next(iter(TASKS))
    if name not in TASKS:
        raise SettingsError("task", name, "no such task", f"use one of {', '.join(TASKS)}")
    return name


def task_class(name: str | None) -> type[Task]:
    """Return the class of a task; raises as `check_task` does."""
    module, _, attribute = TASKS[check_task(name)].partition(":")
    found: type[Task] = getattr(import_module(module), attribute)
    return found


def make_task(settings: SearchSettings) -> Task:
    """Return the task of a search; it is not bound to data yet.

    Raises:
        SettingsError: if there is no such task, or it does not measure the metric asked for.
    """
    return task_class(settings.task)().configured(settings)
