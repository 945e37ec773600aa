"""Rows as the model sees them: tokens, which of them are learned, lengths, and what is cut."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from autopeft.tasks.base import Task
from autopeft.tasks.data import IGNORED, EncodedSplit, TaskData
from autopeft.tasks.summary import DataSummary


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a row that are all learned, or all given.

    Attributes:
        text: Their text, special tokens included.
        is_learned: Whether they add to the loss.
        n_tokens: Their number.
        target: What is to be learned of them, where it is not the text itself: a tag.
    """

    text: str
    is_learned: bool
    n_tokens: int
    target: str = ""


@dataclass(frozen=True)
class Sequence:
    """One sequence of tokens of a row.

    Attributes:
        name: What it is to the task, such as "chosen"; "" where a row has only one.
        pieces: Its tokens.
    """

    name: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class PreviewRow:
    """One row as the model sees it.

    Attributes:
        source_row: Its index in its source, from 0.
        source: File name, or hub id and split.
        sequences: Its sequences of tokens, e.g. the chosen and the rejected answer.
        inputs: Name and size of every input that is no text, such as the pixels of an image; of a
            recording its length and rate, too.
        target: What is to be learned, where it is not among the tokens: a label, a number.
    """

    source_row: int
    source: str
    sequences: tuple[Sequence, ...]
    inputs: tuple[tuple[str, str], ...] = ()
    target: str = ""


@dataclass(frozen=True)
class Preview:
    """What a search would train on.

    Attributes:
        data: What was read, recognized, dropped and cut.
        lengths: Shortest, median, 90th percentile and longest training row, in tokens; shape (4,).
        rows: Some training rows.

    Example:
        >>> preview = autopeft.preview(
        ...     model="~/.cache/autopeft/all-MiniLM-L6-v2",
        ...     data="~/.cache/autopeft/movie_snippets.csv",
        ... )
        >>> preview.data.headline()
        'task text-classification (text=text, label=label)'
    """

    data: DataSummary
    lengths: tuple[int, ...]
    rows: tuple[PreviewRow, ...]


def preview_of(data: TaskData, task: Task, n_rows: int = 3) -> Preview:
    """Return the first training rows, and what was noticed in the data.

    Args:
        data: The encoded data.
        task: The task, with the processor that encoded them.
        n_rows: Rows to show.
    """
    split = data.train
    lengths = np.quantile(split.lengths, [0.0, 0.5, 0.9, 1.0], method="higher").tolist()
    rows = tuple(_row(data, task, split, row) for row in range(min(n_rows, len(split))))
    return Preview(data.summary(), tuple(map(int, lengths)), rows)


def _row(data: TaskData, task: Task, split: EncodedSplit, row: int) -> PreviewRow:
    names = task.sequence_names or ("",) * split.sequences_per_row
    first = row * split.sequences_per_row
    sequences = [
        Sequence(names[i], _pieces(data, split, first + i, task.processor))
        for i in range(split.sequences_per_row if split.has_tokens else 0)
    ]
    labels = split.ragged.get("labels")
    if labels is not None:
        learned = labels.values[labels.offsets[row] : labels.offsets[row + 1]].tolist()
        text = task.processor.decode([token for token in learned if token != IGNORED])
        sequences.append(Sequence(names[-1], (Piece(text, True, len(learned)),)))
    inputs = tuple(
        (name, " x ".join(map(str, array.shape[1:])))
        for name, array in split.row_arrays.items()
        if name in data.input_names and array.ndim > 1
    )
    told = tuple((name, texts[row]) for name, texts in split.texts.items())
    return PreviewRow(
        int(split.source_rows[row]),
        split.source,
        tuple(sequences),
        (*told, *inputs),
        _target(data, split, row),
    )


def _pieces(
    data: TaskData, split: EncodedSplit, sequence: int, processor: Any
) -> tuple[Piece, ...]:
    span = slice(split.offsets[sequence], split.offsets[sequence + 1])
    tokens = split.tokens[span]
    labels = split.token_arrays.get("labels")
    is_learned = np.zeros(len(tokens), bool) if labels is None else labels[span] != IGNORED
    is_change = np.diff(is_learned)
    if data.labels:  # Each learned token has a tag of its own.
        is_change |= is_learned[1:]
    bounds = [0, *(np.flatnonzero(is_change) + 1).tolist(), len(tokens)]
    return tuple(
        Piece(
            processor.decode(tokens[start:end].tolist()),
            bool(is_learned[start]),
            end - start,
            data.labels[int(labels[span][start])]
            if labels is not None and data.labels and is_learned[start]
            else "",
        )
        for start, end in itertools.pairwise(bounds)
        if end > start
    )


def _target(data: TaskData, split: EncodedSplit, row: int) -> str:
    """Return the label or number of a row as text; "" where the tokens are learned."""
    labels = split.row_arrays.get("labels")
    if labels is None:
        return ""
    value = labels[row]
    if data.labels and np.ndim(value):
        return ", ".join(data.labels[i] for i in np.flatnonzero(value)) or "no label"
    return data.labels[int(value)] if data.labels else f"{float(value):g}"
