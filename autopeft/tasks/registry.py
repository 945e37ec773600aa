"""Tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from autopeft.errors import SettingsError
from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.tasks.causal_lm import CausalLM
from autopeft.tasks.data import TaskData
from autopeft.tasks.text_classification import TextClassification

TASKS: Mapping[str, Callable[[SearchSettings, TaskData], Task]] = {
    TextClassification.name: lambda settings, data: TextClassification(
        data.labels, data.pad_id, settings.metric
    ),
    CausalLM.name: lambda settings, _data: CausalLM(settings.metric),
}
"""Task name -> what builds it."""


def make_task(settings: SearchSettings, data: TaskData) -> Task:
    """The task of a search.

    Raises:
        SettingsError: if there is no such task, or it does not measure the metric asked for.
    """
    if settings.task not in TASKS:
        raise SettingsError("task", settings.task, "no such task", f"use one of {', '.join(TASKS)}")
    return TASKS[settings.task](settings, data)
