"""Reads, cleans, splits, checks and tokenizes the data that the settings name."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from autopeft.errors import DataError
from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.tasks.data import SPLITS, SplitName, TaskData
from autopeft.tasks.encoding import padding_id
from autopeft.tasks.reading import Table, is_file_name, read_file, read_hub
from autopeft.tasks.registry import task_class
from autopeft.tasks.rows import Rows
from autopeft.tasks.splitting import SHARES, stratified_parts, stratified_sample

MIN_ROWS: Mapping[SplitName, int] = {"train": 8, "validation": 4, "test": 4}
"""Fewest usable rows of a split."""

_HUB_SPLITS: Mapping[SplitName, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev"),
    "test": ("test",),
}


def load_data(settings: SearchSettings, tokenizer: Any) -> TaskData:
    """Read, clean, split, check and tokenize the data of a search.

    Validation and test rows come from the files or splits that the settings name, else from the
    hub dataset's own splits, else they are split off the training data: stratified, seeded, and
    with all rows of one text in one split. Rows with an empty text or label are dropped and
    counted; so are training rows whose text is also in validation or test.

    Args:
        settings: The settings of the model and the data, and `seed`, are used.
        tokenizer: The model's tokenizer, from transformers.

    Raises:
        DataError: if the data cannot be read or cannot be learned from; before any training.
        SettingsError: if there is no such task.
    """
    task = task_class(settings.task)
    tables = _read(settings, task)
    cleaned = {name: task.clean(settings, table) for name, table in tables.items()}
    # By source, which several splits may share.
    dropped = {
        tables[name].source: tables[name].n_rows - len(rows) for name, rows in cleaned.items()
    }
    task.check_rows(settings, cleaned["train"])
    splits, n_duplicates = _split(cleaned, task, settings.seed)
    limits: Mapping[SplitName, int | None] = {
        "train": settings.max_train_rows,
        "validation": settings.max_validation_rows,
        "test": settings.max_test_rows,
    }
    for name, rows in splits.items():
        sample = stratified_sample(task.strata(rows), limits[name], settings.seed)
        splits[name] = rows.take(sample)
    _check_sizes(splits)
    labels = task.labels_of(splits)
    return TaskData(
        task=task.name,
        splits={
            name: task.encode(tokenizer, splits[name], labels, settings.max_length)
            for name in SPLITS
        },
        labels=labels,
        pad_id=padding_id(tokenizer),
        n_dropped=sum(dropped.values()),
        n_duplicates=n_duplicates,
    )


def _read(settings: SearchSettings, task: type[Task]) -> dict[SplitName, Table]:
    """Return the tables that the settings name; "train" is always among them."""
    if not settings.data:
        raise DataError("data", settings.data, "no data given", "name a file or a hub dataset")
    named: dict[SplitName, str | None] = {"validation": settings.validation, "test": settings.test}
    tables: dict[SplitName, Table] = {}
    hub: dict[str, Table] = {}
    if is_file_name(settings.data):
        tables["train"] = read_file("data", settings.data)
    else:
        hub = read_hub(settings.data, settings.data_name, settings.data_revision)
        for name in SPLITS:
            found = next((split for split in _HUB_SPLITS[name] if split in hub), None)
            if found is not None and named.get(name) is None:
                tables[name] = hub[found]
        if "train" not in tables:
            raise DataError(
                "data", settings.data, f"has no split 'train' (but {sorted(hub)})", "use another"
            )
        tables = {
            name: table
            for name, table in tables.items()
            if name == "train" or _has_targets(settings, task, table)
        }
    for name, source in named.items():
        if source is not None:
            tables[name] = _named(name, source, hub)
    return tables


def _named(name: SplitName, source: str, hub: Mapping[str, Table]) -> Table:
    if source in hub:
        return hub[source]
    if is_file_name(source):
        return read_file(name, source)
    remedy = f"use a file or one of the splits {sorted(hub)}" if hub else "name a file"
    raise DataError(name, source, "neither a file nor a split of the data", remedy)


def _has_targets(settings: SearchSettings, task: type[Task], table: Table) -> bool:
    """Return False for the hidden test sets of the hub, whose labels are all unknown."""
    _, column = task.target_column(settings)
    return any(value is not None for value in table.columns.get(column, ()))


def _split(
    given: Mapping[SplitName, Rows], task: type[Task], seed: int
) -> tuple[dict[SplitName, Rows], int]:
    """Return all three splits, and the number of rows dropped as duplicates of a later split."""
    splits = dict(given)
    n_duplicates = 0
    seen: set[Hashable] = set()
    for name in ("test", "validation", "train"):
        if name in splits:
            keys = splits[name].keys()
            fresh = np.asarray([key not in seen for key in keys], dtype=bool)
            n_duplicates += int((~fresh).sum())
            splits[name] = splits[name].take(np.flatnonzero(fresh).astype(np.int64))
            seen.update(keys)
    wanted: list[SplitName] = [n for n in SPLITS if n == "train" or n not in splits]
    rows = splits["train"]
    shares = [SHARES[name] for name in wanted]
    parts = stratified_parts(rows.keys(), task.strata(rows), shares, seed)
    for name, part in zip(wanted, parts, strict=True):
        splits[name] = rows.take(part)
    return splits, n_duplicates


def _check_sizes(splits: Mapping[SplitName, Rows]) -> None:
    """Raise a DataError if a split is too small to learn from or to score."""
    for name in SPLITS:
        rows = splits[name]
        if len(rows) < MIN_ROWS[name]:
            raise DataError(
                name if name != "train" else "data",
                rows.source,
                f"`usable {name} rows >= {MIN_ROWS[name]}` must hold, but there are {len(rows)}",
                "give more rows (those with an empty text or label do not count)",
            )
