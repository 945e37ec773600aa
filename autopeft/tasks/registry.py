"""The tasks by name. Light: a task's module is imported when the task is used."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from autopeft.errors import DataError, SettingsError

if TYPE_CHECKING:
    from autopeft.settings import SearchSettings
    from autopeft.tasks.base import Task
    from autopeft.tasks.reading import Table

TASKS: Mapping[str, str] = {
    "text-classification": "autopeft.tasks.text_classification:TextClassification",
    "sft": "autopeft.tasks.sft:SupervisedFineTuning",
    "seq2seq": "autopeft.tasks.seq2seq:Seq2Seq",
    "image-classification": "autopeft.tasks.image_classification:ImageClassification",
}
"""Task name -> its class as `module:name`. Data without a named task gets the first that fits."""


FORMER_NAMES: Mapping[str, str] = {"causal-lm": "sft"}
"""Former name of a task -> its name now."""


def check_task(name: str | None) -> None:
    """Check the name of a task; None: it is recognized from the data.

    Raises:
        SettingsError: if there is no such task.
    """
    if name is not None and FORMER_NAMES.get(name, name) not in TASKS:
        raise SettingsError("task", name, "no such task", f"use one of {', '.join(TASKS)}")


def task_class(name: str) -> type[Task]:
    """Return the class of a task; raises as `check_task` does."""
    check_task(name)
    module, _, attribute = TASKS[FORMER_NAMES.get(name, name)].partition(":")
    found: type[Task] = getattr(import_module(module), attribute)
    return found


def named_task(settings: SearchSettings) -> Task:
    """Return the task that resolved settings name; it is not bound to data yet."""
    assert settings.task is not None, "resolved settings name their task"
    return task_class(settings.task)().configured(settings)


def make_task(settings: SearchSettings, table: Table, model_config: Any = None) -> Task:
    """Return the task of a search; it is not bound to data yet.

    Args:
        settings: Name the task, or leave it to the data.
        table: The training data.
        model_config: The configuration of the model.

    Raises:
        SettingsError: if there is no such task, it does not measure the metric asked for, or the
            data fits none.
    """
    name = settings.task or _recognized(settings, table, model_config)
    return task_class(name)().configured(settings, model_config)


def _recognized(settings: SearchSettings, table: Table, model_config: Any) -> str:
    """Return the first task that model and columns fit; tasks are in order of preference."""
    named = settings.column_names()
    misfit: DataError | None = None
    for name in TASKS:
        task = task_class(name)
        if not task.fits_model(model_config) or not set(named).issubset(
            column.role for column in task.columns
        ):
            continue
        try:
            names = task.find_columns(named, table)
        except DataError as error:
            if error.field in named:
                raise
            continue
        try:
            task.check_fit(table, names)
        except DataError as error:
            misfit = misfit or error
            continue
        return name
    if misfit is not None:
        raise misfit
    shown = ", ".join(table.column_names)
    raise SettingsError(
        "task",
        settings.task,
        f"no task fits the columns of {table.source}: {shown}",
        "name a --task and its columns (see `autopeft tasks`)",
    )
