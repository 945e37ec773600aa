from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from training_samples import split_of

from autopeft.tasks.data import IGNORED, TaskData
from autopeft.tasks.packing import bins_of, packed_batch, packed_shape, usual_bins

_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=64).map(np.asarray)


@given(_lengths, st.integers(1, 20))
def test_each_row_is_in_one_bin_and_bins_are_even(lengths: np.ndarray, n_bins: int) -> None:
    bins = bins_of(lengths, n_bins)
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(lengths)))
    assert len(bins) == min(n_bins, len(lengths))
    sizes = [lengths[places].sum() for places in bins]
    assert max(sizes) - min(sizes) <= lengths.max()
    assert packed_shape(lengths, 1) == (1, lengths.sum())
    assert packed_shape(lengths, n_bins) == (len(bins), max(sizes))
    assert 1 <= usual_bins(lengths) <= max(1, len(lengths) // 2 + 1)


def test_positions_begin_with_each_row_and_its_first_token_is_not_learned() -> None:
    rows = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14]]
    split = split_of(rows, prompts=[0, 2, 1])
    data = TaskData("sft", {"train": split}, (), pad_id=0)
    batch = packed_batch(data, "train", np.array([2, 1, 0]), 2)
    assert batch.input_ids.tolist() == [[8, 9, 10, 11, 12], [5, 6, 7, 13, 14]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    ignored = IGNORED
    assert batch.labels.tolist() == [[ignored, ignored, 10, 11, 12], [ignored, 6, 7, ignored, 14]]
    assert batch.owners is not None
    assert batch.owners.tolist() == [[1, 1, 1, 1, 1], [2, 2, 2, 0, 0]]
    assert set(batch.model_inputs()) == {"input_ids", "position_ids"}
    # What is left of a bin is a row that nothing belongs to.
    batch = packed_batch(data, "train", np.array([1, 0]), 2)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["position_ids"].tolist()[1] == [0, 1, 2, 0, 1]
    assert batch.cells is not None
    assert batch.cells[1].tolist() == [0, 1, 2, -1, -1]
