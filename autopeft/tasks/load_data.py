"""Reads, cleans, splits, checks and encodes the data that the settings name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autopeft.errors import DataError
from autopeft.settings import SearchSettings, Source
from autopeft.tasks.base import Task
from autopeft.tasks.data import SPLITS, EncodedSplit, SplitName, TaskData
from autopeft.tasks.encoding import UNLIMITED, covering_length, padding_id, tokenizer_limit
from autopeft.tasks.examples import Examples
from autopeft.tasks.reading import Table, read
from autopeft.tasks.splitting import SHARES, spread_parts, stratified_parts, stratified_sample

MIN_ROWS: Mapping[SplitName, int] = {"train": 8, "validation": 4, "test": 4}
"""Fewest usable rows of a split."""

_SCORED_SHARES: Mapping[str, float] = {"validation": 0.5, "test": 0.5}
"""Of rows that are only scored: none are trained on."""

_HUB_SPLITS: Mapping[SplitName, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev"),
    "test": ("test",),
}


def load_data(
    settings: SearchSettings,
    task: Task,
    processor: Any,
    given: Mapping[SplitName, Table],
    *,
    model_limit: int | None = None,
    scored_with: TaskData | None = None,
) -> TaskData:
    """Clean, split, check and encode the data of a search.

    Validation and test rows come from the files or splits that the settings name, else from the
    hub dataset's own splits, else they are split off the training data: stratified, seeded, and
    with equal rows (`Task.identity`) in one split. Incomplete rows are dropped and counted; so are
    training rows that are also in validation or test.

    Args:
        settings: The settings of the data, and `seed`, are used.
        task: Configured with the settings.
        processor: What the task encodes with: the model's tokenizer or processor.
        given: The sources, from `read_tables`.
        model_limit: Longest sequence that the model takes, in tokens; None: unknown.
        scored_with: What the model is trained on, where these rows are only scored: there is no
            train split, and labels and the scale of the outputs are its. Without test rows of their
            own, half of the rows are; likewise for validation.

    Raises:
        DataError: if the data cannot be learned from, or not be scored; before any training.
    """
    cleaned: dict[SplitName, Examples] = {}
    unused: list[str] = []
    for name, table in given.items():
        is_wanted = name == "train" or _is_named(settings, name)
        try:
            rows = task.clean(table)
        except DataError as error:
            if is_wanted:
                raise
            unused.append(f"{table.source} is not used: {error}")
            continue
        # The labels of hidden test sets of the hub are all unknown.
        if len(rows) or is_wanted:
            cleaned[name] = rows
        else:
            why = "; ".join(rows.dropped) or "it has no rows"
            unused.append(f"{table.source} is not used: {why}")
    if scored_with is None:
        task.check_rows(cleaned["train"])
    shares = SHARES if scored_with is None else _SCORED_SHARES
    splits, duplicates = _split(cleaned, task, settings.seed, shares)
    limits: Mapping[SplitName, int | None] = {
        "train": settings.max_train_rows,
        "validation": settings.max_validation_rows,
        "test": settings.max_test_rows,
    }
    available: dict[SplitName, int] = {}
    for name, rows in splits.items():
        if (limits[name] or len(rows)) < len(rows):
            available[name] = len(rows)
        sample = stratified_sample(task.strata(rows), limits[name], settings.seed)
        splits[name] = rows.take(sample)
    _check_sizes(splits, cleaned, duplicates, task)
    if scored_with is None:
        labels, output_scale = task.labels_of(splits), task.output_scale(splits)
    else:
        labels, output_scale = scored_with.labels, scored_with.output_scale
    max_length, encoded = _max_length(settings, task, processor, splits, labels, model_limit)
    for name in splits:
        if name not in encoded:
            encoded[name] = task.encode(processor, splits[name], labels, max_length)
        _check_encoded(name, encoded[name], max_length)
    # By source, which several splits may share.
    by_source = {rows.source: rows for rows in cleaned.values()}
    dropped = Counter[str]()
    for rows in by_source.values():
        dropped.update(rows.dropped)
    for split in encoded.values():
        dropped.update(split.dropped)
    return TaskData(
        task=task.name,
        splits={name: encoded[name] for name in SPLITS if name in encoded},
        labels=labels,
        pad_id=padding_id(processor),
        input_names=task.input_names,
        max_length=max_length,
        dropped=dict(dropped),
        n_duplicates=sum(duplicates.values()),
        notes=(
            *unused,
            *dict.fromkeys(note for rows in by_source.values() for note in rows.notes),
            *dict.fromkeys(note for split in encoded.values() for note in split.notes),
            *task.notes(labels),
        ),
        output_scale=output_scale,
        columns=task.find_columns(settings.column_names(), given["train"]),
        available=available,
        replaces_head=task.replaces_head(labels),
        usage=task.usage(splits["train"], max_length) if scored_with is None else "",
    )


def _max_length(
    settings: SearchSettings,
    task: Task,
    processor: Any,
    splits: Mapping[SplitName, Examples],
    labels: tuple[str, ...],
    model_limit: int | None,
) -> tuple[int, dict[SplitName, EncodedSplit]]:
    """Return the longest sequence allowed, and the splits that are known encoded with it already.

    By default, the lengths of all rows decide.
    """
    limits = [limit for limit in (tokenizer_limit(processor), model_limit) if limit is not None]
    limit = min(limits) if limits else None
    if settings.max_length is not None:
        if limit is not None and settings.max_length > limit:
            raise DataError(
                "max_length",
                settings.max_length,
                f"the model takes at most {limit} tokens",
                f"use {limit} or less, or leave it out",
            )
        return settings.max_length, {}
    usual = task.usual_length(splits)
    longest = limit or usual or UNLIMITED
    whole = {name: task.encode(processor, rows, labels, longest) for name, rows in splits.items()}
    if not any(split.has_tokens for split in whole.values()):
        return 0 if usual is None else longest, whole
    length = covering_length(np.concatenate([s.lengths for s in whole.values()]))
    return length, {n: s for n, s in whole.items() if s.lengths.max(initial=0) <= length}


def read_tables(settings: SearchSettings) -> dict[SplitName, Table]:
    """Return the sources that the settings name; "train" is always among them.

    Raises:
        DataError: if one cannot be read.
    """
    if not settings.data:
        raise DataError("data", settings.data, "no data given", "name a file or a hub dataset")
    named: dict[SplitName, Source | None] = {
        "validation": settings.validation,
        "test": settings.test,
    }
    max_bytes = int(settings.max_data_gb * 2**30)
    found = read(
        "data",
        settings.data,
        name=settings.data_name,
        revision=settings.data_revision,
        max_bytes=max_bytes,
    )
    tables: dict[SplitName, Table] = {}
    for name in SPLITS:
        split = next((split for split in _HUB_SPLITS[name] if split in found), None)
        if split is not None and named.get(name) is None:
            tables[name] = found[split]
    if "train" not in tables:
        if len(found) > 1:
            raise DataError(
                "data",
                settings.data,
                f"has no split 'train' (but {sorted(found)})",
                "save one of them as a file and name that",
            )
        # The only split there is, whatever its name.
        tables = {"train": next(iter(found.values()))}
    for name, source in named.items():
        if source is not None:
            split_of_data = found.get(source) if isinstance(source, str) else None
            tables[name] = split_of_data or _named(name, source, found, max_bytes)
    return tables


def _named(name: SplitName, source: Source, found: Mapping[str, Table], max_bytes: int) -> Table:
    """Return a split from a source of its own."""
    if isinstance(source, str) and source.isidentifier() and not Path(source).exists():
        remedy = f"use a file or one of the splits {sorted(found)}"
        raise DataError(
            name,
            source,
            "neither a file nor a split of the data",
            remedy if set(found) != {"train"} else "name a file",
        )
    tables = read(name, source, max_bytes=max_bytes)
    for split in (*_HUB_SPLITS[name], "train"):
        if split in tables and (split != "train" or len(tables) == 1):
            return tables[split]
    raise DataError(
        name, source, f"has several splits ({sorted(tables)})", "name the file of one of them"
    )


def _is_named(settings: SearchSettings, name: SplitName) -> bool:
    return (settings.validation if name == "validation" else settings.test) is not None


def _split(
    given: Mapping[SplitName, Examples], task: Task, seed: int, shares: Mapping[str, float]
) -> tuple[dict[SplitName, Examples], dict[SplitName, int]]:
    """Return the splits of `shares`, and how many rows of each were dropped as a later one's."""
    splits = dict(given)
    duplicates: dict[SplitName, int] = {}
    seen: set[Hashable] = set()
    for name in reversed(SPLITS):
        if name in splits:
            keys = _keys(splits[name], task)
            fresh = np.asarray([key not in seen for key in keys], dtype=bool)
            duplicates[name] = int((~fresh).sum())
            splits[name] = splits[name].take(np.flatnonzero(fresh).astype(np.int64))
            seen.update(keys)
    wanted: list[SplitName] = [
        n for n in SPLITS if n in shares and (n == "train" or n not in splits)
    ]
    rows = splits.pop("train")
    if wanted:
        sizes, strata = [shares[name] for name in wanted], task.strata(rows)
        if "train" not in shares and 2 * len(set(strata)) > len(rows):
            strata = [0] * len(rows)  # Each is of a kind of its own, and equal parts have none.
        keys = _keys(rows, task)
        parts = stratified_parts(keys, strata, sizes, seed)
        if any(len(part) < MIN_ROWS[name] for name, part in zip(wanted, parts, strict=True)):
            parts = spread_parts(keys, strata, sizes, seed)  # Strata of a row or two fill few.
        for name, part in zip(wanted, parts, strict=True):
            splits[name] = rows.take(part)
    return {name: splits[name] for name in SPLITS if name in splits}, duplicates


def _keys(rows: Examples, task: Task) -> list[Hashable]:
    return rows.keys(*(role for role in task.identity if role in rows.columns))


def _check_sizes(
    splits: Mapping[SplitName, Examples],
    given: Mapping[SplitName, Examples],
    duplicates: Mapping[SplitName, int],
    task: Task,
) -> None:
    """Raise a DataError, with the cause, if a split is too small to learn from or to score."""
    for name, rows in splits.items():
        if len(rows) >= MIN_ROWS[name]:
            continue
        source = given.get(name, given["train"])
        problem = f"`usable {name} rows >= {MIN_ROWS[name]}` must hold, but there are {len(rows)}"
        causes = [f"{count} dropped because {reason}" for reason, count in source.dropped.items()]
        remedy = "give more rows"
        if duplicates.get(name, 0) > len(rows):
            causes.append(f"{duplicates[name]} are also in a later split")
            remedy = "give different files for training, validation and test"
        elif name not in given and (n := len(set(_keys(source, task)))) < sum(MIN_ROWS.values()):
            cause = f"only {n} of {len(source)} rows differ, and equal rows stay in one split"
            causes.append(cause)
            remedy = "give rows that differ, or name other columns with --columns"
        elif source.dropped:
            remedy = "fill in what is missing, or name other columns with --columns"
        elif name not in given:
            remedy = f"give more rows, or a file of {name} rows (`{name}`)"
        if causes:
            problem += f" ({'; '.join(causes)})"
        raise DataError(
            name if name in given and name != "train" else "data", rows.source, problem, remedy
        )


def _check_encoded(name: SplitName, rows: EncodedSplit, max_length: int) -> None:
    """Raise a DataError if too few rows could be encoded."""
    if len(rows) >= MIN_ROWS[name]:
        return
    causes = "; ".join(f"{count}: {reason}" for reason, count in rows.dropped.items())
    raise DataError(
        "max_length",
        max_length,
        f"only {len(rows)} {name} rows of {rows.source} are left ({causes})",
        "use a larger max_length, shorter rows, or rows with more to learn",
    )
