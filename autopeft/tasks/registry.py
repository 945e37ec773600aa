"""The tasks by name. Light: a task's module is imported when the task is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

from autopeft.errors import DataError, ModelError, SettingsError
from autopeft.utils.registry import Registry
from autopeft.utils.serialize import nearest

if TYPE_CHECKING:
    from autopeft.settings import SearchSettings
    from autopeft.tasks.base import Task
    from autopeft.tasks.reading import Table

F = TypeVar("F")


def _as_task(name: str, part: Any) -> Task:
    from autopeft.tasks.base import Task

    if isinstance(part, type) and issubclass(part, Task):
        part = part()
    if not isinstance(part, Task):
        raise TypeError("must be a Task or a class of tasks")
    if name and part.name != name:
        raise TypeError(f"is the task {part.name!r}")
    return part


TASKS: Registry[Task] = Registry("task", "autopeft.tasks", __name__, _as_task)
"""Every task. Data without a named task gets the first that fits."""


@overload
def register_task(name: str, task: None = None) -> Callable[[F], F]: ...
@overload
def register_task(name: str, task: F) -> F: ...
@overload
def register_task(name: F) -> F: ...
def register_task(name: Any, task: Any = None) -> Any:
    """Register a task, so that settings can name it and data can be recognized as its own.

    A call, or a decorator of a class that can be made without arguments. A package offers
    one with an entry point of the group `autopeft.tasks`.

    Args:
        name: The task, its class, or its name.
        task: The task, its class, or where it is found, as `module:name`.

    Returns:
        The task or class, or a decorator.

    Raises:
        SettingsError: if the name stands for another task.

    Example:
        >>> from autopeft.tasks.text_classification import TextClassification
        >>> @autopeft.register_task
        ... class Sentiment(TextClassification):
        ...     name = "sentiment"
        ...     description = "a sentiment for each review"
        >>> autopeft.SearchSettings(model="gpt2", data="reviews.csv", task="sentiment").task
        'sentiment'
    """
    return TASKS.door(name, task)


for _name, _path in {
    "preference": "autopeft.tasks.preference:Preference",
    "token-classification": "autopeft.tasks.token_classification:TokenClassification",
    "text-classification": "autopeft.tasks.text_classification:TextClassification",
    "multi-label-classification": (
        "autopeft.tasks.multi_label_classification:MultiLabelClassification"
    ),
    "regression": "autopeft.tasks.regression:Regression",
    "sft": "autopeft.tasks.sft:SupervisedFineTuning",
    "seq2seq": "autopeft.tasks.seq2seq:Seq2Seq",
    "image-classification": "autopeft.tasks.image_classification:ImageClassification",
    "audio-classification": "autopeft.tasks.audio_classification:AudioClassification",
    "transcription": "autopeft.tasks.transcription:Transcription",
    "embeddings": "autopeft.tasks.embeddings:Embeddings",
}.items():
    register_task(_name, _path)


FORMER_NAMES: Mapping[str, str] = {"causal-lm": "sft"}
"""Former name of a task -> its name now."""


def check_task(name: str | None) -> None:
    """Check what the settings name as task; None: it is recognized from the data.

    Raises:
        SettingsError: if there is no such task.
    """
    if name is not None and name not in TASKS:
        find_task(name)


def find_task(value: str) -> Task:
    """Return the task of that name, or at `package.module:name`.

    Raises:
        SettingsError: if there is none.
    """
    return TASKS.resolve("task", FORMER_NAMES.get(value, value))


def named_task(settings: SearchSettings) -> Task:
    """Return the task that resolved settings name; it is not bound to data yet."""
    assert settings.task is not None, "resolved settings name their task"
    return find_task(settings.task).configured(settings)


def make_task(settings: SearchSettings, table: Table, model_config: Any = None) -> Task:
    """Return the task of a search; it is not bound to data yet.

    Args:
        settings: Name the task, or leave it to the data.
        table: The training data.
        model_config: The configuration of the model.

    Raises:
        SettingsError: if there is no such task, it does not measure the metric asked for, or the
            data fits none.
        ModelError: if the model is of a kind that the task cannot use.
    """
    name = settings.task or _recognized(settings, table, model_config)
    from autopeft.models.loading import auto_loader

    task = find_task(name)
    if not task.fits_model(model_config):
        # Encoders can be loaded as decoders too, but would see later tokens.
        is_encoder = type(model_config) in auto_loader("AutoModelForMaskedLM")._model_mapping
        fitting = [
            each.name
            for each in TASKS.parts()
            if each.fits_model(model_config) and not (each.is_autoregressive and is_encoder)
        ]
        remedy = f"use another model, or one of the tasks for this one: {', '.join(fitting)}"
        raise ModelError(
            "model",
            settings.model,
            f"is {_kind(model_config)}, which is no model for {task.name} ({task.auto_class})",
            remedy if fitting else "use a transformer that this task can load",
        )
    return task.configured(settings, model_config)


def _kind(model_config: Any) -> str:
    return getattr(model_config, "model_type", "") or "of an unknown kind"


def _recognized(settings: SearchSettings, table: Table, model_config: Any) -> str:
    """Return the first task that model and columns fit; tasks are in order of preference."""
    named = settings.column_names()
    misfit: DataError | None = None
    unfit: list[str] = []
    for task in TASKS.parts():
        if not set(named).issubset(column.role for column in task.columns):
            continue
        try:
            names = task.find_columns(named, table)
        except DataError as error:
            if error.field in named and task.fits_model(model_config):
                raise
            continue
        fits_model = task.fits_model(model_config)
        try:
            task.check_fit(table, names)
        except DataError as error:
            misfit = misfit or (error if fits_model else None)
            continue
        if fits_model:
            return task.name
        unfit.append(task.name)
    if misfit is not None:
        raise misfit
    if unfit:
        raise ModelError(
            "model",
            settings.model,
            f"is {_kind(model_config)}, which fits no task of the columns of {table.source}: "
            + ", ".join(unfit),
            "use a transformer for one of these tasks, or other columns (see `autopeft tasks`)",
        )
    roles = {column.role for task in TASKS.parts() for column in task.columns}
    for role in set(named) - roles:
        problem = f"no task reads a column as {role!r}"
        raise SettingsError("columns", f"{role}={named[role]}", problem, nearest(role, roles))
    shown = ", ".join(table.column_names)
    raise SettingsError(
        "task",
        settings.task,
        f"no task fits the columns of {table.source}: {shown}",
        "name a --task and its columns (see `autopeft tasks`)",
    )
