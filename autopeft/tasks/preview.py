"""Rows as the model sees them: tokens, which of them are learned, lengths, and what is cut."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from autopeft.tasks.data import IGNORED, EncodedSplit, TaskData


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a row that are all learned, or all given.

    Attributes:
        text: Their text, special tokens included.
        is_learned: Whether they add to the loss.
        n_tokens: Their number.
    """

    text: str
    is_learned: bool
    n_tokens: int


@dataclass(frozen=True)
class PreviewRow:
    """One row as the model sees it.

    Attributes:
        source_row: Its index in its source.
        sequences: Its sequences of tokens, e.g. the chosen and the rejected answer.
        target: What is to be learned, where it is not among the tokens: a label, a number.
    """

    source_row: int
    sequences: tuple[tuple[Piece, ...], ...]
    target: str = ""


@dataclass(frozen=True)
class Preview:
    """What a search would train on.

    Attributes:
        task: Name of the task.
        lines: What was read, dropped and cut, one sentence each.
        lengths: Shortest, median, 90th percentile and longest training row, in tokens; shape (4,).
        rows: Some training rows.

    Example:
        >>> preview = autopeft.preview(
        ...     model="~/.cache/autopeft/all-MiniLM-L6-v2",
        ...     data="~/.cache/autopeft/movie_snippets.csv",
        ... )
        >>> preview.task
        'text-classification'
    """

    task: str
    lines: tuple[str, ...]
    lengths: tuple[int, ...]
    rows: tuple[PreviewRow, ...]


def preview_of(data: TaskData, processor: Any, n_rows: int = 3) -> Preview:
    """Return the first training rows, and what was noticed in the data."""
    split = data.train
    lengths = np.quantile(split.lengths, [0.0, 0.5, 0.9, 1.0], method="higher").tolist()
    rows = tuple(_row(data, split, row, processor) for row in range(min(n_rows, len(split))))
    return Preview(data.task, tuple(data.lines()), tuple(map(int, lengths)), rows)


def _row(data: TaskData, split: EncodedSplit, row: int, processor: Any) -> PreviewRow:
    first = row * split.sequences_per_row
    sequences = [
        _pieces(split, sequence, processor)
        for sequence in range(first, first + split.sequences_per_row if split.has_tokens else first)
    ]
    labels = split.ragged.get("labels")
    if labels is not None:
        learned = labels.values[labels.offsets[row] : labels.offsets[row + 1]].tolist()
        sequences.append((Piece(processor.decode(learned), True, len(learned)),))
    return PreviewRow(int(split.source_rows[row]), tuple(sequences), _target(data, split, row))


def _pieces(split: EncodedSplit, sequence: int, processor: Any) -> tuple[Piece, ...]:
    span = slice(split.offsets[sequence], split.offsets[sequence + 1])
    tokens = split.tokens[span]
    labels = split.token_arrays.get("labels")
    is_learned = np.zeros(len(tokens), bool) if labels is None else labels[span] != IGNORED
    changes = np.flatnonzero(np.diff(is_learned)) + 1
    bounds = [0, *changes.tolist(), len(tokens)]
    return tuple(
        Piece(processor.decode(tokens[start:end].tolist()), bool(is_learned[start]), end - start)
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
