"""Reads and encodes what a model should not forget: the setting `retain`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from autopeft.errors import DataError
from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.tasks.csv_layout import FileError
from autopeft.tasks.data import IGNORED, EncodedSplit, Retained, TaskData
from autopeft.tasks.encoding import flat, split_of
from autopeft.tasks.examples import Examples
from autopeft.tasks.file_bytes import decoded, file_suffix
from autopeft.tasks.reading import Table, read
from autopeft.tasks.registry import find_task
from autopeft.utils.formatting import counted

LANGUAGE = "sft"
"""The task whose loss says what a decoder retains: that of the next token."""

_WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
"""Hub dataset and configuration that `wikitext` stands for."""

_SPLITS = ("test", "validation", "train")
"""Of a source with several splits, the first of these is retained."""

_CHARACTERS = 64
"""Characters of a text that are tokenized for each token that is scored: no more are needed."""

_UNNAMED: Mapping[str, Any] = {
    **dict.fromkeys(("text", "text_pair", "label", "prompt", "completion", "columns"), None),
    **dict.fromkeys(("metric", "task_options"), None),
    "packing": False,
}
"""Settings of the search's own rows, which say nothing of retained ones."""


def retained_task(name: str, settings: SearchSettings) -> Task:
    """Return the task that scores retained rows, with none of the search's columns and metrics."""
    return find_task(name).configured(replace(settings, task=name, **_UNNAMED))


def load_retained(
    settings: SearchSettings, task: Task, processor: Any, data: TaskData, given: Iterable[Table]
) -> TaskData:
    """Return the data with what `retain` names, and a note of what is scored of it.

    A decoder is scored by the loss of the next token: plain text is cut into windows of
    `data.max_length` tokens, one after another and without special tokens; rows are chats,
    prompts with completions, or texts. A model without a language-model head is scored by its own
    task's loss on labeled rows, if its head is not new.

    Args:
        settings: `retain`, `retain_rows`, and how data are read.
        task: The search's task, bound to its data.
        processor: What it encodes with.
        data: The encoded data of the search.
        given: The sources of the search, for rows that are in both.

    Raises:
        DataError: if it cannot be read, or is what the search trains on.
    """
    if settings.retain is None:
        return data
    if not task.is_autoregressive and not _has_own_loss(task, data):
        raise DataError(
            "retain",
            settings.retain,
            f"the bare {task.auto_class} of {task.name} has no loss to compare with: it has no "
            "language-model head, and no trained head of its own",
            "leave it out, use a decoder with --task sft, or a model that has such a head already",
        )
    try:
        rows, note = _encoded(settings, task, processor, data, tuple(given))
    except FileError as error:
        raise DataError("retain", settings.retain, error.problem, error.remedy) from error
    except DataError as error:
        if error.field == "retain":
            raise
        raise DataError("retain", settings.retain, error.problem, error.remedy) from error
    name = LANGUAGE if task.is_autoregressive else task.name
    notes = (*data.notes, f"retain: {note}; the bare model's loss on it is measured once a worker")
    return replace(data, retained=Retained(rows, name), notes=notes)


def _has_own_loss(task: Task, data: TaskData) -> bool:
    """Return whether the task's loss means something without training, row by row."""
    return task.can_share_batch and data.train.has_tokens and not data.replaces_head


def _encoded(
    settings: SearchSettings, task: Task, processor: Any, data: TaskData, given: tuple[Table, ...]
) -> tuple[EncodedSplit, str]:
    """Return the rows to score, and what they are."""
    assert settings.retain is not None, "checked before"
    table = _table(settings)
    table, n_shared = _without_shared(table, given)
    shared = f", {counted(n_shared, 'row')} left out that the search's data have too"
    n_most, length = settings.retain_rows, data.max_length
    if task.is_autoregressive and table.column_names == ["text"]:
        text = _raw_text(settings.retain) if not n_shared else None
        text = text or "\n".join(str(value) for value in table.columns["text"] if value is not None)
        rows = _windows(processor, text, length, n_most, table.source)
    else:
        scoring = retained_task(LANGUAGE, settings) if task.is_autoregressive else task
        scoring.processor = processor
        cleaned = scoring.clean(table)
        first = cleaned.take(np.arange(min(n_most, len(cleaned)), dtype=np.int64))
        try:
            rows = scoring.encode(processor, first, data.labels, length)
        except KeyError as error:
            problem = f"has the label {error}, which the search's data lack"
            raise DataError("retain", table.source, problem, "give rows of its labels") from error
    if not len(rows):
        why = "; ".join(rows.dropped) or "no row can be scored"
        raise DataError("retain", settings.retain, why, "give a text, or rows of sft")
    learned = rows.token_arrays.get("labels")
    n_terms = len(rows) if learned is None else int((learned != IGNORED).sum())
    kind = "window" if table.column_names == ["text"] else "row"
    return rows, (
        f"the first {counted(len(rows), kind)} of {table.source}, of at most {length} tokens, "
        f"{n_terms:,} losses{shared if n_shared else ''}"
    )


def _table(settings: SearchSettings) -> Table:
    """Return all rows of what is to be retained."""
    source, name = settings.retain, None
    if source == "wikitext" and not Path(source).exists():
        source, name = _WIKITEXT
    found = read("retain", source, name=name, max_bytes=int(settings.max_data_gb * 2**30))
    split = next((split for split in _SPLITS if split in found), next(iter(found)))
    return found[split]


def _raw_text(source: str) -> str | None:
    """Return a text file as it is, empty lines included; None for another source."""
    path = Path(source)
    is_plain = path.is_file() and path.suffix == file_suffix(path) == ".txt"
    return decoded(path)[0] if is_plain else None


def _windows(processor: Any, text: str, length: int, n_most: int, source: str) -> EncodedSplit:
    """Return the first windows of a text; every token but the first of each is predicted."""
    tokenizer = getattr(processor, "tokenizer", processor)
    part = text[: n_most * length * _CHARACTERS]
    ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
    windows = [ids[start : start + length] for start in range(0, len(ids), length)][:n_most]
    windows = [window for window in windows if len(window) > 1]
    rows = Examples({}, np.arange(len(windows), dtype=np.int64), source)
    labels = [[IGNORED, *window[1:]] for window in windows]
    return split_of(rows, windows, token_arrays={"labels": flat(labels).astype(np.int32)})


def _without_shared(table: Table, given: tuple[Table, ...]) -> tuple[Table, int]:
    """Return the rows that the search's data do not have, and how many they have, too.

    Raises:
        DataError: if they have all.
    """
    known = {key for other in given for key in _keys(other)}
    keys = _keys(table)
    kept = [row for row, key in enumerate(keys) if key not in known]
    n_shared = len(keys) - len(kept)
    if not kept:
        raise DataError(
            "retain",
            table.source,
            f"all {counted(n_shared, 'row')} are also in the search's data",
            "give text that the model should still know, not what it is trained on",
        )
    if not n_shared:
        return table, 0
    columns = {name: [values[row] for row in kept] for name, values in table.columns.items()}
    return replace(table, columns=columns), n_shared


def _keys(table: Table) -> list[str]:
    """Return what each row says, whatever its columns are called and in which order they are."""
    cells = zip(*table.columns.values(), strict=True)
    return [
        "\n".join(sorted(" ".join(str(cell).split()) for cell in row if cell is not None))
        for row in cells
    ]
