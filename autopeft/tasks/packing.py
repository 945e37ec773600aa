"""Rows of a step one after another in few long sequences, each attending to itself alone.

Positions begin at 0 with each row. From them, transformers keeps the rows apart: by a
block-diagonal mask, or by FlashAttention's kernels for rows of unlike length.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from autopeft.tasks.batch import Batch
from autopeft.tasks.data import IGNORED, SplitName, TaskData
from autopeft.utils.device import sent_together

IntArray = NDArray[np.int64]


def bins_of(lengths: IntArray, n_bins: int) -> list[IntArray]:
    """Distribute rows so that the fullest bin is small: the longest first, into the emptiest bin.

    Returns the places of the rows in each bin, each shape (n,); fewer bins if rows are fewer.
    """
    sizes = np.zeros(min(n_bins, len(lengths)), dtype=np.int64)
    found: list[list[int]] = [[] for _ in sizes]
    for place in np.argsort(-lengths, kind="stable").tolist():
        emptiest = int(sizes.argmin())
        found[emptiest].append(place)
        sizes[emptiest] += lengths[place]
    return [np.array(places, dtype=np.int64) for places in found]


def usual_bins(lengths: IntArray) -> int:
    """Return how many bins suit a block-diagonal mask: twice as long as the longest row.

    Longer ones have less padding, but their attention computes more that the mask hides.
    """
    return max(1, round(int(lengths.sum()) / (2 * int(lengths.max()))))


def packed_shape(lengths: IntArray, n_bins: int) -> tuple[int, int]:
    """Return the sequences that rows are packed into, and their tokens, padding included."""
    bins = bins_of(lengths, n_bins)
    return len(bins), max(int(lengths[places].sum()) for places in bins)


def packed_batch(
    data: TaskData,
    split: SplitName,
    rows: IntArray,
    n_bins: int,
    device: str | torch.device = "cpu",
) -> Batch:
    """Return rows of one sequence each as a batch of `n_bins` sequences.

    The model gets "input_ids" and "position_ids", both of shape (n_bins, t), and no mask. "labels"
    are -100 where a row begins: nothing predicts its first token.

    Args:
        data: Encoded data with the token array "labels".
        split: Name of the split.
        rows: Positions in the split, shape (b,).
        n_bins: Sequences at most.
        device: Device of the tensors.
    """
    source = data.splits[split]
    starts, lengths = source.offsets[rows], source.sequence_lengths[rows]
    bins = bins_of(lengths, n_bins)
    width = max(int(lengths[places].sum()) for places in bins)
    # What is left of a bin counts on like a row of its own, which no row sees.
    cells = np.full((len(bins), width), -1, dtype=np.int64)
    owners = np.zeros_like(cells)
    positions = np.zeros_like(cells)
    for number, places in enumerate(bins):
        begin = 0
        for place in places.tolist():
            inside = slice(begin, begin + int(lengths[place]))
            own = np.arange(lengths[place])
            positions[number, inside] = own
            cells[number, inside] = starts[place] + own
            owners[number, inside] = place
            begin = inside.stop
        positions[number, begin:] = np.arange(width - begin)
    is_token = cells >= 0
    labels = np.where(is_token, source.token_arrays["labels"][cells], IGNORED)
    arrays = {
        "input_ids": np.where(is_token, source.tokens[cells], data.pad_id).astype(np.int64),
        "attention_mask": is_token.astype(np.int64),
        "position_ids": positions,
        "labels": np.where(positions > 0, labels, IGNORED).astype(np.int64),
    }
    tensors = sent_together(arrays, device)
    names = ("input_ids", "position_ids")
    return Batch(split, rows, rows, tensors, names, arrays, cells=cells, owners=owners)
