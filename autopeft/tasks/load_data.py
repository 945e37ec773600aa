"""From what the user named to frozen arrays: read, clean, split, check, tokenize."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopeft.errors import DataError, SettingsError
from autopeft.settings import SearchSettings
from autopeft.tasks.data import SPLITS, EncodedSplit, SplitName, TaskData
from autopeft.tasks.encoding import Encoded, encode_prompts, encode_texts, padding_id
from autopeft.tasks.reading import Table, is_file_name, read_file, read_hub
from autopeft.tasks.splitting import SHARES, stratified_parts, stratified_sample

TASK_NAMES = ("text-classification", "causal-lm")

MIN_ROWS: Mapping[SplitName, int] = {"train": 8, "validation": 4, "test": 4}
"""Fewer usable rows than this in a split is a mistake, not a data set."""

_HUB_SPLITS: Mapping[SplitName, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev"),
    "test": ("test",),
}


@dataclass(frozen=True)
class Rows:
    """Cleaned rows of one source.

    Attributes:
        first: Text, or prompt.
        second: Second text of a pair, or None where there are no pairs.
        target: Label name, or completion.
        source_rows: Index of each row in its source, shape (n_rows,).
        source: File name, or hub id and split.
    """

    first: tuple[str, ...]
    second: tuple[str, ...] | None
    target: tuple[str, ...]
    source_rows: NDArray[np.int64]
    source: str

    def __len__(self) -> int:
        return len(self.first)

    def take(self, index: NDArray[np.int64]) -> Rows:
        """The rows at these positions."""
        pick = index.tolist()
        return Rows(
            tuple(self.first[i] for i in pick),
            None if self.second is None else tuple(self.second[i] for i in pick),
            tuple(self.target[i] for i in pick),
            self.source_rows[index],
            self.source,
        )

    def keys(self) -> list[Hashable]:
        """What makes two rows the same text: letter case and spacing do not count."""
        first = [_folded(a) or _folded(t) for a, t in zip(self.first, self.target, strict=True)]
        if self.second is None:
            return list(first)
        return [(a, _folded(b)) for a, b in zip(first, self.second, strict=True)]


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def load_data(settings: SearchSettings, tokenizer: Any) -> TaskData:
    """Reads, cleans, splits, checks and tokenizes the data of a search.

    Validation and test rows come from the files or splits named in the settings, else from the
    hub data set's own splits, else they are split off the training data: stratified, seeded, and
    with all rows of one text in one split. Rows with an empty text or label are dropped and
    counted; so are training rows whose text is also in validation or test.

    Args:
        settings: Uses the "Model and data" group and `seed`.
        tokenizer: The model's tokenizer, from transformers.

    Raises:
        DataError: if the data cannot be read or cannot be learned from; before any training.
        SettingsError: if there is no such task.
    """
    if settings.task not in TASK_NAMES:
        raise SettingsError(
            "task", settings.task, "no such task", f"use one of {', '.join(TASK_NAMES)}"
        )
    tables = _read(settings)
    cleaned = {name: _clean(settings, table) for name, table in tables.items()}
    dropped = {
        tables[name].source: tables[name].n_rows - len(rows) for name, rows in cleaned.items()
    }
    _check_classes(settings, cleaned["train"])
    splits, n_duplicates = _split(cleaned, settings)
    splits = {name: _limit(name, rows, settings) for name, rows in splits.items()}
    labels = _check(settings, splits)
    encoded = {name: _encode(settings, tokenizer, rows) for name, rows in splits.items()}
    return TaskData(
        task=settings.task,
        splits={name: _encoded_split(encoded[name], splits[name], labels) for name in SPLITS},
        labels=labels,
        pad_id=padding_id(tokenizer),
        n_dropped=sum(dropped.values()),
        n_duplicates=n_duplicates,
        n_truncated=sum(part.n_truncated for part in encoded.values()),
        dropped_from={source: count for source, count in dropped.items() if count},
    )


def _read(settings: SearchSettings) -> dict[SplitName, Table]:
    """The tables that the settings name; "train" is always there."""
    if not settings.data:
        raise DataError("data", settings.data, "no data given", "name a file or a hub data set")
    named: dict[SplitName, str | None] = {
        "validation": settings.validation,
        "test": settings.test,
    }
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
            if name == "train" or _has_targets(settings, table)
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


def _target_column(settings: SearchSettings) -> tuple[str, str]:
    """(setting, column) of what is to be learned."""
    if settings.task == "causal-lm":
        return "completion", settings.completion
    return "label", settings.label


def _has_targets(settings: SearchSettings, table: Table) -> bool:
    """False for the hidden test sets of the hub, whose labels are all unknown."""
    _, column = _target_column(settings)
    return any(value is not None for value in table.columns.get(column, ()))


def _clean(settings: SearchSettings, table: Table) -> Rows:
    """Rows as text, the incomplete ones dropped."""
    is_causal = settings.task == "causal-lm"
    target = [_as_text(v) for v in table.column(*_target_column(settings))]
    second: list[str] | None = None
    if is_causal:
        first = [_as_text(v) for v in table.column("prompt", settings.prompt)]
        keep = [bool(c.strip()) for c in target]
    else:
        first = [_as_text(v) for v in table.column("text", settings.text)]
        target = [label.strip() for label in target]
        keep = [bool(t.strip() and label) for t, label in zip(first, target, strict=True)]
        if settings.text_pair is not None:
            second = [_as_text(v) for v in table.column("text_pair", settings.text_pair)]
            keep = [ok and bool(t.strip()) for ok, t in zip(keep, second, strict=True)]
    every = Rows(
        tuple(first),
        None if second is None else tuple(second),
        tuple(target),
        np.arange(len(first), dtype=np.int64),
        table.source,
    )
    return every.take(np.flatnonzero(np.asarray(keep, dtype=bool)).astype(np.int64))


def _as_text(value: Any) -> str:
    """A cell as text; a missing one is empty, a whole number loses its decimal point."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _strata(rows: Rows, settings: SearchSettings) -> Sequence[Hashable]:
    """What a split balances: the labels; for causal LM the completions, if they are but a few."""
    if settings.task == "causal-lm" and len(set(rows.target)) > 20:
        return [0] * len(rows)
    return rows.target


def _split(
    given: Mapping[SplitName, Rows], settings: SearchSettings
) -> tuple[dict[SplitName, Rows], int]:
    """All three splits, and how many rows were dropped because a later split has their text."""
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
    parts = stratified_parts(rows.keys(), _strata(rows, settings), shares, settings.seed)
    for name, part in zip(wanted, parts, strict=True):
        splits[name] = rows.take(part)
    return splits, n_duplicates


def _limit(name: SplitName, rows: Rows, settings: SearchSettings) -> Rows:
    limit = {
        "train": settings.max_train_rows,
        "validation": settings.max_validation_rows,
        "test": settings.max_test_rows,
    }[name]
    return rows.take(stratified_sample(_strata(rows, settings), limit, settings.seed))


def _check_classes(settings: SearchSettings, rows: Rows) -> None:
    """Raises DataError if the labels of the training source cannot be classes."""
    labels = set(rows.target)
    if settings.task == "causal-lm" or not labels:
        return
    if len(labels) == 1:
        raise DataError(
            "label",
            settings.label,
            f"the column has one class only ({labels.pop()!r})",
            "give rows of at least two classes",
        )
    if len(labels) > len(rows) / 2:
        raise DataError(
            "label",
            settings.label,
            f"the column has {len(labels)} different values in {len(rows)} rows",
            "name a column with classes, not with numbers or free text",
        )


def _check(settings: SearchSettings, splits: Mapping[SplitName, Rows]) -> tuple[str, ...]:
    """The label names, after checking that something can be learned and scored.

    Raises:
        DataError: if a split is too small, or train lacks a label.
    """
    for name in SPLITS:
        rows = splits[name]
        if len(rows) < MIN_ROWS[name]:
            raise DataError(
                name if name != "train" else "data",
                rows.source,
                f"`usable {name} rows >= {MIN_ROWS[name]}` must hold, but there are {len(rows)}",
                "give more rows (those with an empty text or label do not count)",
            )
    if settings.task == "causal-lm":
        return ()
    labels = set(splits["train"].target)
    for name in SPLITS:
        unknown = sorted(set(splits[name].target) - labels)
        if unknown:
            raise DataError(
                "label",
                unknown[0],
                f"occurs in {name} but in no training row",
                "add training rows with it, or drop it",
            )
    return tuple(sorted(labels, key=_label_order))


def _label_order(label: str) -> tuple[int, float, str]:
    """Numbers by value and before words, so that "10" follows "9"."""
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label


def _encode(settings: SearchSettings, tokenizer: Any, rows: Rows) -> Encoded:
    if settings.task == "causal-lm":
        return encode_prompts(tokenizer, rows.first, rows.target, settings.max_length)
    return encode_texts(tokenizer, rows.first, rows.second, settings.max_length)


def _encoded_split(coded: Encoded, rows: Rows, labels: tuple[str, ...]) -> EncodedSplit:
    if coded.prompt_lengths is not None:
        targets = coded.prompt_lengths
    else:
        index = {label: i for i, label in enumerate(labels)}
        targets = np.asarray([index[label] for label in rows.target], dtype=np.int64)
    return EncodedSplit(
        coded.tokens, coded.offsets, targets, rows.source_rows, rows.source, coded.type_ids
    )
