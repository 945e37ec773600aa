"""Which rows go into a batch together: rows of similar length, so that little is padding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

POOL_BATCHES = 32
"""Rows of so many batches are sorted by length together: enough for tight batches, while which
rows meet in a batch still changes from epoch to epoch."""


def training_batches(lengths: IntArray, batch_size: int, seed: int) -> Iterator[IntArray]:
    """Endless batches of rows of similar length, in an order that depends on the seed alone.

    Every batch has the same number of rows, so that a step means the same at any length; the few
    rows left over at the end of an epoch (other ones each time) sit it out.

    Args:
        lengths: Tokens of each row, shape (n_rows,).
        batch_size: Rows a batch; all rows where there are fewer.
        seed: Seeds the order.

    Yields:
        Row positions, shape (min(batch_size, n_rows),).
    """
    n_rows = len(lengths)
    size = min(batch_size, n_rows)
    generator = np.random.default_rng([seed, 0x0BA7C4])
    while True:
        order = generator.permutation(n_rows)[: n_rows // size * size]
        for start in range(0, len(order), size * POOL_BATCHES):
            pool = order[start : start + size * POOL_BATCHES]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            batches = pool.reshape(-1, size)
            yield from batches[generator.permutation(len(batches))]


def evaluation_batches(lengths: IntArray, token_budget: int) -> Iterator[IntArray]:
    """Every row once, longest first, in batches of at most `token_budget` padded tokens.

    Longest first, so that a batch too large for the memory fails at once and not at the end.

    Args:
        lengths: Tokens of each row, shape (n_rows,).
        token_budget: Rows times longest row of a batch, at most; a single longer row still comes.

    Yields:
        Row positions, shape (b,) with b varying.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, token_budget // max(1, int(lengths[order[start]])))
        yield order[start : start + size]
        start += size


def rung_sample(n_rows: int, limit: int | None) -> IntArray | None:
    """The rows looked at at a rung: always the same ones, so that trials compare fairly.

    Args:
        n_rows: Rows of the split.
        limit: How many to look at.

    Returns:
        Sorted row positions, or None for all.
    """
    if limit is None or limit >= n_rows:
        return None
    return np.sort(np.random.default_rng(0).permutation(n_rows)[:limit])
