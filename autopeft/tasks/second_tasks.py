"""Reads the further tasks on which what is trained is scored too: the setting `also`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from autopeft.costs.constraints import Constraint
from autopeft.costs.objectives import Objective, quality_beside
from autopeft.errors import DataError, SettingsError, UserError
from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.tasks.data import EncodedSplit, SecondTask, SplitName, TaskData
from autopeft.tasks.load_data import load_data, read_tables
from autopeft.tasks.reading import Table
from autopeft.tasks.registry import TASKS, make_task
from autopeft.tasks.shared_rows import without_shared
from autopeft.utils.formatting import counted
from autopeft.utils.serialize import nearest
from autopeft.utils.yaml_files import read_yaml

NAME = "name"
"""Key of a further task's name; by default, it is that of its file."""

_SUFFIXES = (".yaml", ".yml", ".json")
"""Of settings files."""

OWN = (
    *("task", "data", "data_name", "data_revision", "validation", "test"),
    *("text", "text_pair", "label", "prompt", "completion", "columns"),
    *("task_options", "metric", "max_length", "on_long"),
    *("max_validation_rows", "max_test_rows", "generation_rows"),
)
"""Settings that a further task has for itself; what they say of the search's data is not of it."""


def read_also(entries: Sequence[str | Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Return what each further task's file says, its name included; mappings stay as they are.

    Raises:
        SettingsError: if a file cannot be read, or says what no further task has; if two have one
            name.

    Example:
        >>> from autopeft.tasks.second_tasks import read_also
        >>> read_also([{"name": "squad", "data": "squad.jsonl", "metric": "token_f1"}])[0]["metric"]
        'token_f1'
    """
    rows: list[dict[str, Any]] = []
    for entry in entries:
        row = dict(entry) if isinstance(entry, Mapping) else _in_file(entry)
        name = row.get(NAME)
        if not isinstance(name, str) or quality_beside(f"{name}.metric") is None:
            problem = "a further task needs a name of letters, digits, - and _"
            raise SettingsError(f"also.{NAME}", name, problem, "write e.g. name: squad")
        if name in (other[NAME] for other in rows):
            problem = "two further tasks have this name"
            raise SettingsError(f"also.{NAME}", name, problem, "give one of them another `name`")
        with _of(name):
            _check_keys(row)
        rows.append(row)
    return tuple(rows)


def _in_file(path: str) -> dict[str, Any]:
    remedy = "name a settings file, with data, task and metric of a further task"
    file = Path(path).expanduser()
    try:
        row = read_yaml(file, field="also", remedy=remedy, error=SettingsError)
    except SettingsError as error:
        if file.suffix in _SUFFIXES:
            raise
        # Perhaps it is the data, or a hub dataset.
        remedy = (
            f"name a settings file such as {file.stem or 'squad'}.yaml, with the line data: {path}"
        )
        raise SettingsError("also", path, error.problem, remedy) from error
    return {NAME: file.stem, **row}


def _check_keys(row: Mapping[str, Any]) -> None:
    known = [each.name for each in fields(SearchSettings)]
    for key, value in row.items():
        if key in (*OWN, NAME):
            continue
        if key == "also":
            problem, remedy = "a further task has none of its own", "name it beside this one"
        elif key in known:
            problem = "is no setting of a further task, which is only scored"
            remedy = f"leave it out; it has {NAME}, {', '.join(OWN)}"
        else:
            problem, remedy = "unknown key", nearest(key, (NAME, *OWN))
        raise SettingsError(key, value, problem, remedy)
    if not row.get("data"):
        raise SettingsError("data", "", "is missing", "name a file or a hub dataset")


@contextmanager
def _of(name: str) -> Iterator[None]:
    """Let errors say which further task they are about."""
    try:
        yield
    except UserError as error:
        field = f"also.{name}.{error.field}"
        raise type(error)(field, error.value, error.problem, error.remedy) from error


def second_settings(settings: SearchSettings, row: Mapping[str, Any]) -> SearchSettings:
    """Return the settings that score a further task, from what its file says.

    Raises:
        SettingsError: if a value is of the wrong type or out of range.
    """
    said = SearchSettings.from_mapping({key: row[key] for key in row if key != NAME})
    own = {key: getattr(said, key) for key in OWN}
    return replace(settings, **own, also=(), retain=None, packing=False)


def load_also(
    settings: SearchSettings, task: Task, data: TaskData, given: Iterable[Table], config: Any
) -> TaskData:
    """Return the data with the further tasks that `also` names, and a note of each.

    Its validation rows score trials, its test rows finalists. Where its file names none, and its
    source has none, half of the rows are each: none are trained on.

    Args:
        settings: `also`, the model, and how data are read.
        task: The search's task, bound to its data.
        data: The encoded data of the search.
        given: The sources of the search, for rows that are in both.
        config: The configuration of the model, from transformers.

    Raises:
        UserError: if one cannot be read, needs another head than the one that is trained, or is
            what the search trains on.
    """
    tables = tuple(given)
    for row in read_also(settings.also):
        with _of(row[NAME]):
            second, note = _second(settings, row, task, data, tables, config)
        notes = (*data.notes, f"also {row[NAME]}: {note}")
        data = replace(data, second=(*data.second, second), notes=notes)
    return data


def _second(
    settings: SearchSettings,
    row: Mapping[str, Any],
    task: Task,
    data: TaskData,
    given: Sequence[Table],
    config: Any,
) -> tuple[SecondTask, str]:
    own = second_settings(settings, row)
    tables = read_tables(own)
    own = _with_task(own, task, tables["train"])
    second = make_task(own, tables["train"], config)
    _check_head(task, second)
    own = replace(own, task=second.name)
    second.processor = second.load_processor(settings.model, settings.model_revision)
    kept, places = _unseen(tables, given)
    try:
        rows = load_data(
            own, second, second.processor, kept, model_limit=second.length_limit(), scored_with=data
        )
    except KeyError as error:
        problem = f"has the label {error}, which the search's data lack"
        raise DataError(
            "data", tables["train"].source, problem, "give rows of its labels"
        ) from error
    splits = {
        name: replace(split, source_rows=places[_origin(name, kept)][split.source_rows])
        for name, split in rows.splits.items()
    }
    rows = replace(rows, splits=splits)
    second.bound(rows).check_metrics(rows)
    metric = second.quality
    quality = replace(metric, name=f"{row[NAME]}.{metric.name}")
    if quality_beside(quality.name) is None:
        problem = "its name cannot be that of an objective"
        raise SettingsError("metric", metric.name, problem, "call it by letters, digits, - and _")
    n_shared = sum(tables[name].n_rows - len(places[name]) for name in kept)
    return SecondTask(quality, metric.name, own, rows), _note(second, rows, n_shared)


def _with_task(own: SearchSettings, task: Task, table: Table) -> SearchSettings:
    """Return settings that name the search's task, if they name none and its columns are there."""
    if own.task is not None:
        return own
    try:
        task.check_fit(table, task.find_columns(own.column_names(), table))
    except DataError:
        return own  # The columns tell which one it is.
    return replace(own, task=task.name)


def _check_head(task: Task, second: Task) -> None:
    """Check that what is trained for one task can be scored on the other, head and all."""
    if _fits_head(task, second):
        return
    fitting = [each.name for each in TASKS.parts() if _fits_head(task, each)]
    problem = (
        f"reads the head of {second.auto_class}, but the search trains that of {task.auto_class} "
        f"for {task.name}"
    )
    if second.auto_class == task.auto_class:
        problem = f"reads other outputs of the head than {task.name}, which the search trains"
    remedy = f"name rows of {' or '.join(fitting)}, or search on it instead"
    raise SettingsError("task", second.name, problem, remedy)


def _fits_head(task: Task, other: Task) -> bool:
    """Return whether the head that one task trains is the one that the other reads.

    Decoders share that of the language model; any other head is of one task.
    """
    if other.name == task.name:
        return True
    are_decoders = task.is_autoregressive and other.is_autoregressive
    return are_decoders and other.auto_class == task.auto_class


def _unseen(
    tables: Mapping[SplitName, Table], given: Sequence[Table]
) -> tuple[dict[SplitName, Table], dict[SplitName, Any]]:
    """Return the tables without rows of the search's data, and where the rest was in them."""
    has_both = "validation" in tables and "test" in tables
    remedy = "give rows that are not trained on"
    kept: dict[SplitName, Table] = {}
    places: dict[SplitName, Any] = {}
    for name, table in tables.items():
        if name == "train" and has_both:
            kept[name], places[name] = table, np.arange(table.n_rows)  # None of it is scored.
            continue
        field = "data" if name == "train" else name
        kept[name], places[name] = without_shared(field, table, given, remedy)
    return kept, places


def _origin(name: SplitName, tables: Mapping[SplitName, Table]) -> SplitName:
    """Return the table that a split is from."""
    return name if name in tables else "train"


def _note(second: Task, data: TaskData, n_shared: int) -> str:
    """Return what is scored, and what is not."""

    def shown(rows: EncodedSplit) -> str:
        return f"{counted(len(rows), 'row')} of {rows.source}"

    parts = [
        f"{second.name}, {shown(data.validation)} score trials and {shown(data.test)} finalists, "
        f"by {second.quality.name}, of at most {data.max_length} tokens"
    ]
    parts += [f"{counted(n, 'row')} dropped because {reason}" for reason, n in data.dropped.items()]
    if data.n_truncated:
        parts.append(f"{counted(data.n_truncated, 'row')} cut")
    if n_shared:
        parts.append(f"{counted(n_shared, 'row')} left out that the search's data have too")
    return "; ".join([*parts, *data.notes])


def checked_beside(
    objectives: Sequence[Objective], constraints: Iterable[Constraint], second: Sequence[SecondTask]
) -> tuple[Objective, ...]:
    """Return the objectives of a search, further qualities as those say who measure them.

    Args:
        objectives: The leading quality first.
        constraints: Limits; those on costs are passed over.
        second: What measures further qualities.

    Raises:
        SettingsError: if a further quality is asked for that nothing measures, or a limit on one
            keeps off the front what is best.
    """
    measured = {each.name: each.quality for each in second}
    limits = [limit for limit in constraints if limit.is_of_quality]
    for name in (*(o.name for o in objectives[1:]), *(limit.name for limit in limits)):
        if quality_beside(name) is not None and name not in measured:
            raise _unmeasured(name, list(measured))
    for limit in limits:
        limit.check_direction(measured[limit.name])
    return (objectives[0], *(measured.get(o.name, o) for o in objectives[1:]))


def _unmeasured(name: str, measured: Sequence[str]) -> SettingsError:
    """Return the error of a further quality that nothing measures."""
    task, _, metric = name.partition(".")
    problem = f"is missing, so {name} cannot be measured"
    if not metric:
        remedy = "give a text file, e.g. retain=wikitext"
        return SettingsError("retain", "", problem, remedy)
    others = [each for each in measured if "." in each]
    if not others:
        return SettingsError("also", "", problem, f"give the settings file {task}.yaml")
    problem = f"measures {', '.join(others)}, not {name}"
    names = [each.split(".")[0] for each in others]
    remedy = f"use {others[0]}" if len(others) == 1 else "use one of those"
    if task in names:
        remedy += f", or write `metric: {metric}` in {task}"
    else:
        remedy += f", or give the settings file {task}.yaml too"
    return SettingsError("also", names, problem, remedy)
