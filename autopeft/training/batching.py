"""Batches of rows of similar length, to keep padding small."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

POOL_BATCHES = 32
"""Number of batches whose rows are sorted by length together: enough to keep padding small, while
batches still hold other rows in every epoch."""


def training_batches(lengths: IntArray, batch_size: int, seed: int) -> Iterator[IntArray]:
    """Yield endless batches of rows of similar length, in an order that only the seed decides.

    Every batch has the same number of rows. The few rows left over at the end of an epoch are
    skipped; they are other ones each time.

    `lengths` are the tokens of each row, shape (n_rows,). Yields row positions, shape (b,), where b
    is `batch_size`, or n_rows if that is less.
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


def micro_batches(lengths: IntArray, token_budget: int) -> list[IntArray]:
    """Split the rows of a step into consecutive ones of at most `token_budget` padded tokens.

    A longer row is alone. Returns positions in `lengths`, each shape (n,).
    """
    found: list[list[int]] = []
    longest = 0
    for place, length in enumerate(lengths.tolist()):
        longest = max(longest, length)
        if found and (len(found[-1]) + 1) * longest <= token_budget:
            found[-1].append(place)
        else:
            found.append([place])
            longest = length
    return [np.array(places, dtype=np.int64) for places in found]


def evaluation_batches(lengths: IntArray, token_budget: int) -> Iterator[IntArray]:
    """Yield every row once, in batches of at most `token_budget` padded tokens.

    The longest rows come first, so that a batch that does not fit into memory fails at once.

    A longer row gets a batch of its own. Yields row positions, shape (b,); b varies.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, token_budget // max(1, int(lengths[order[start]])))
        yield order[start : start + size]
        start += size


def padded_tokens(lengths: IntArray, token_budget: int) -> float:
    """Return the tokens of a row in `evaluation_batches`, padding included, on average."""
    batches = evaluation_batches(lengths, token_budget)
    return sum(len(rows) * int(lengths[rows].max()) for rows in batches) / len(lengths)


def rung_sample(n_rows: int, limit: int | None) -> IntArray | None:
    """Return the sorted rows to score at a rung, the same ones in every trial; None: all."""
    if limit is None or limit >= n_rows:
        return None
    return np.sort(np.random.default_rng(0).permutation(n_rows)[:limit])
