"""Covering arrays: some pairs of a product in every run, all of them in the nightly run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

ARCHITECTURES = ("bert", "llama", "gpt2", "t5", "albert", "modernbert", "gemma3", "vit", "bart")
"""Nine unlike models: encoders, decoders, both, shared blocks, fused projections, no text."""


def usual_first(values: Sequence[Any], *usual: Any) -> list[Any]:
    """Parameters of a test: of these values, all but the usual ones are marked `nightly`."""
    return [
        pytest.param(value, marks=() if value in usual else pytest.mark.nightly) for value in values
    ]


def covering(rows: Sequence[Any], columns: Sequence[Any], *, each: int) -> list[Any]:
    """Parameters (row, column) of a test, for `pytest.mark.parametrize`.

    Every row meets `each` of the columns, in turns that shift from row to row; the other pairs
    are marked `nightly`. Rows and columns may be `pytest.param`s of one value.
    """
    pairs = []
    for i, row in enumerate(rows):
        start = i * each + i * each // len(columns)
        met = {(start + k) % len(columns) for k in range(each)}
        for j, column in enumerate(columns):
            (first, marks), (second, others) = _parts(row), _parts(column)
            nightly = () if j in met else (pytest.mark.nightly,)
            pairs.append(pytest.param(first, second, marks=(*marks, *others, *nightly)))
    return pairs


def _parts(value: Any) -> tuple[Any, tuple[Any, ...]]:
    """A parameter's value and marks."""
    if hasattr(value, "marks"):
        return value.values[0], tuple(value.marks)
    return value, ()
