from __future__ import annotations

from itertools import islice, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from autopeft.training.batching import evaluation_batches, micro_batches, training_batches

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=200).map(np.asarray)


@given(lengths, st.integers(1, 20), st.integers(0, 9))
def test_an_epoch_sees_every_row_at_most_once(
    sizes: np.ndarray, batch_size: int, seed: int
) -> None:
    size = min(batch_size, len(sizes))
    n_batches = len(sizes) // size
    epoch = list(islice(training_batches(sizes, batch_size, seed), n_batches))
    assert all(len(batch) == size for batch in epoch)
    rows = np.concatenate(epoch)
    assert len(set(rows.tolist())) == len(rows) == n_batches * size


def test_the_seed_decides_the_order_and_epochs_differ() -> None:
    sizes = np.arange(64) % 13
    first, again, other = (
        [b.tolist() for b in islice(training_batches(sizes, 8, seed), 16)] for seed in (0, 0, 1)
    )
    assert first == again != other
    assert first[:8] != first[8:]


def test_batches_hold_rows_of_similar_length() -> None:
    sizes = np.random.default_rng(0).integers(1, 100, size=512)
    batches = list(islice(training_batches(sizes, 16, 0), 32))
    padded = sum(len(b) * sizes[b].max() for b in batches)
    assert padded < 1.1 * sizes.sum()


@given(lengths, st.integers(1, 300))
def test_evaluation_sees_every_row_once_within_the_budget(sizes: np.ndarray, budget: int) -> None:
    batches = list(evaluation_batches(sizes, budget))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(sizes)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * sizes[batch].max() <= budget


@given(lengths, st.integers(1, 300))
def test_micro_batches_hold_a_steps_rows_in_order_within_the_budget(
    sizes: np.ndarray, budget: int
) -> None:
    parts = micro_batches(sizes, budget)
    assert np.concatenate(parts).tolist() == list(range(len(sizes)))
    for part in parts:
        assert len(part) == 1 or len(part) * sizes[part].max() <= budget
    for part, after in pairwise(parts):
        # The next row had no room.
        assert (len(part) + 1) * sizes[[*part, after[0]]].max() > budget
