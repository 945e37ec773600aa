"""The encoded data of a search: flat arrays that workers share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class EncodedSplit:
    """Tokenized rows, concatenated.

    Attributes:
        tokens: Token ids of all rows, shape (n_tokens,), int32.
        offsets: Row i is `tokens[offsets[i]:offsets[i + 1]]`, shape (n_rows + 1,), int64.
        targets: Shape (n_rows,), int64. Classification: index of the label. Causal LM: length of
            the prompt, which adds no loss.
        source_rows: Index of each row in its source, from 0, shape (n_rows,), int64. It identifies
            the rows for anyone who scores them again.
        source: File name, or hub id and split.
        type_ids: Index in the pair of each token's text, like `tokens` but int8; None for single
            texts.
        n_truncated: Number of rows that were cut to the longest allowed length.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    targets: NDArray[np.int64]
    source_rows: NDArray[np.int64]
    source: str
    type_ids: NDArray[np.int8] | None = None
    n_truncated: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, shape (n_rows,)."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class LengthStatistics:
    """Lengths of the training rows, which the price of a candidate depends on.

    Attributes:
        mean_padded: Mean padded length of a length-bucketed batch, in tokens.
        longest: Tokens of the longest row.
        mean_targets: Mean number of positions per row that need logits: 1 for classification.
    """

    mean_padded: float
    longest: int
    mean_targets: float


@dataclass(frozen=True)
class TaskData:
    """The encoded data of a search.

    Attributes:
        task: Name of the task it was encoded for.
        splits: Split name -> rows.
        labels: Label names, index = target; empty for causal LM.
        pad_id: Token id that pads batches; the attention mask hides it.
        n_dropped: Rows dropped because a text or label was empty.
        n_duplicates: Rows dropped from train or validation because a later split has their text.
    """

    task: str
    splits: Mapping[SplitName, EncodedSplit]
    labels: tuple[str, ...]
    pad_id: int
    n_dropped: int = 0
    n_duplicates: int = 0

    @property
    def train(self) -> EncodedSplit:
        """Rows to train on."""
        return self.splits["train"]

    @property
    def validation(self) -> EncodedSplit:
        """Rows that the search scores."""
        return self.splits["validation"]

    @property
    def test(self) -> EncodedSplit:
        """Rows that only the confirmation scores."""
        return self.splits["test"]

    @property
    def n_truncated(self) -> int:
        """Number of rows that were cut to the longest allowed length."""
        return sum(split.n_truncated for split in self.splits.values())

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of a SHA-256 over all arrays and labels."""
        digest = hashlib.sha256(repr((self.task, self.labels, self.pad_id)).encode())
        for name in SPLITS:
            split = self.splits[name]
            for array in (split.tokens, split.offsets, split.targets, split.type_ids):
                digest.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def length_statistics(self, batch_size: int) -> LengthStatistics:
        """Return the lengths of training rows in batches of `batch_size` rows of similar length."""
        lengths = np.sort(self.train.lengths)
        n_full = max(1, len(lengths) // batch_size)
        # The longest row of each batch of sorted rows; training batches come close to it.
        ends = np.minimum(np.arange(1, n_full + 1) * batch_size, len(lengths)) - 1
        targets = np.ones_like(lengths)
        if not self.labels:
            targets = self.train.lengths - np.maximum(self.train.targets, 1)
        return LengthStatistics(
            mean_padded=float(lengths[ends].mean()),
            longest=int(lengths[-1]),
            mean_targets=float(targets.mean()),
        )
