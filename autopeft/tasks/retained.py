"""Reads and encodes what a model should not forget: the setting `retain`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from autopeft.costs.objectives import QUALITIES
from autopeft.errors import DataError
from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.tasks.csv_layout import FileError
from autopeft.tasks.data import IGNORED, EncodedSplit, SecondTask, TaskData
from autopeft.tasks.encoding import flat, split_of
from autopeft.tasks.examples import Examples
from autopeft.tasks.file_bytes import decoded, file_suffix
from autopeft.tasks.reading import Table, read
from autopeft.tasks.registry import named_task
from autopeft.tasks.shared_rows import without_shared
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
}
"""Settings of the search's own rows, which say nothing of retained ones."""


_COLUMNS = "name its columns text, or prompt and completion, or messages, or give a text file"


def retained_settings(task: Task, settings: SearchSettings) -> SearchSettings:
    """Return the settings that score retained rows.

    A decoder has none of the search's columns and metrics; another model is scored by its own task.
    """
    own = replace(settings, task=task.name, retain=None, also=(), packing=False)
    return replace(own, task=LANGUAGE, **_UNNAMED) if task.is_autoregressive else own


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
        # A decoder's columns cannot be named: --columns names those of the search's own rows.
        remedy = _COLUMNS if task.is_autoregressive else error.remedy
        raise DataError("retain", settings.retain, error.problem, remedy) from error
    own = retained_settings(task, settings)
    kept = replace(data, task=own.task or task.name, splits={"test": rows}, second=(), notes=())
    forgetting = SecondTask(QUALITIES["forgetting"], "loss", own, kept, is_over_base=True)
    notes = (*data.notes, f"retain: {note}; the bare model's loss on it is measured once a worker")
    return replace(data, second=(*data.second, forgetting), notes=notes)


def _has_own_loss(task: Task, data: TaskData) -> bool:
    """Return whether the task's loss means something without training, row by row."""
    return task.can_share_batch and data.train.has_tokens and not data.replaces_head


def _encoded(
    settings: SearchSettings, task: Task, processor: Any, data: TaskData, given: tuple[Table, ...]
) -> tuple[EncodedSplit, str]:
    """Return the rows to score, and what they are."""
    assert settings.retain is not None, "checked before"
    table = _table(settings)
    remedy = "give text that the model should still know, not what it is trained on"
    n_all = table.n_rows
    table, _ = without_shared("retain", table, given, remedy, is_text=task.is_autoregressive)
    n_shared = n_all - table.n_rows
    shared = f", {counted(n_shared, 'row')} left out that the search's data have too"
    n_most, length, dropped = settings.retain_rows, data.max_length, Counter[str]()
    if task.is_autoregressive and table.column_names == ["text"]:
        text = _raw_text(settings.retain) if not n_shared else None
        text = text or "\n".join(str(value) for value in table.columns["text"] if value is not None)
        rows = _windows(processor, text, length, n_most, table.source)
    else:
        scoring = task
        if task.is_autoregressive:
            scoring = named_task(retained_settings(task, settings))
        scoring.processor = processor
        cleaned = scoring.clean(table)
        first = cleaned.take(np.arange(min(n_most, len(cleaned)), dtype=np.int64))
        dropped += cleaned.dropped
        try:
            rows = scoring.encode(processor, first, data.labels, length)
        except KeyError as error:
            problem = f"has the label {error}, which the search's data lack"
            raise DataError("retain", table.source, problem, "give rows of its labels") from error
    if not len(rows):
        why = "; ".join({**dropped, **rows.dropped}) or "no row can be scored"
        raise DataError("retain", settings.retain, why, "give a text, or rows of sft")
    dropped += rows.dropped
    learned = rows.token_arrays.get("labels")
    n_terms = len(rows) if learned is None else int((learned != IGNORED).sum())
    kind = "window" if table.column_names == ["text"] else "row"
    return rows, (
        f"the first {counted(len(rows), kind)} of {table.source}, of at most {length} tokens, "
        f"{n_terms:,} losses{shared if n_shared else ''}{_left_out(dropped)}"
    )


def _left_out(dropped: Mapping[str, int]) -> str:
    parts = (f", {counted(n, 'row')} left out: {why}" for why, n in dropped.items())
    return "".join(parts)


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
