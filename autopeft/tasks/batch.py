"""Rows of a split as padded tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autopeft.tasks.data import IGNORED, EncodedSplit, SplitName, TaskData
from autopeft.utils.device import sent_together


@dataclass(frozen=True)
class Batch:
    """Some rows of one split, padded on the right to the longest of them.

    Attributes:
        split: Name of the split.
        rows: Positions of the rows in the split, shape (b,).
        sequences: Positions of their sequences in the split, shape (b * sequences_per_row,).
        tensors: Name -> tensor. "input_ids" and "attention_mask" (1 for tokens, 0 for padding) have
            shape (b * sequences_per_row, t), int64; so have the split's token arrays, padded with
            -100 if they are labels, else with 0. Row arrays have shape (b, ...), and rows of their
            own lengths (b, longest).
        input_names: Names of the tensors that the model's forward gets.
        arrays: Name -> the same numbers on the host, where they are known there; see `on_host`.
        cells: Of a packed batch (`autopeft.tasks.packing`): where each token is in the split, -1
            for padding, shape (n, t) as its "input_ids".
        owners: Of a packed batch: the place in `sequences` of the one that each token is of.

    Example:
        >>> tensors = {"input_ids": torch.tensor([[2, 7, 3]]), "labels": torch.tensor([1])}
        >>> batch = autopeft.Batch("train", np.array([4]), np.array([4]), tensors, ("input_ids",))
        >>> batch.labels, list(batch.model_inputs())
        (tensor([1]), ['input_ids'])
    """

    split: SplitName
    rows: NDArray[np.int64]
    sequences: NDArray[np.int64]
    tensors: Mapping[str, torch.Tensor]
    input_names: tuple[str, ...]
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict, repr=False, compare=False)
    cells: NDArray[np.int64] | None = field(default=None, repr=False, compare=False)
    owners: NDArray[np.int64] | None = field(default=None, repr=False, compare=False)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    @property
    def input_ids(self) -> torch.Tensor:
        """Token ids, shape (b * sequences_per_row, t), int64."""
        return self.tensors["input_ids"]

    @property
    def attention_mask(self) -> torch.Tensor:
        """1 for tokens and 0 for padding, shape as `input_ids`."""
        return self.tensors["attention_mask"]

    @property
    def labels(self) -> torch.Tensor:
        """What is to be learned; shape and meaning are the task's."""
        return self.tensors["labels"]

    def model_inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of the model's forward."""
        return {name: self.tensors[name] for name in self.input_names if name in self.tensors}

    def on_host(self, name: str) -> NDArray[Any]:
        """Return a tensor's numbers. A batch of `collate` knows them without asking its device."""
        known = self.arrays.get(name)
        return self.tensors[name].cpu().numpy() if known is None else known

    def with_tensors(self, **tensors: torch.Tensor) -> Batch:
        """Return the batch with some tensors added or replaced."""
        arrays = {name: array for name, array in self.arrays.items() if name not in tensors}
        return replace(self, tensors={**self.tensors, **tensors}, arrays=arrays)


@dataclass(frozen=True)
class Window:
    """Consecutive positions in each row of a batch, the same number in all rows.

    Attributes:
        starts: First position in each row, shape (b,), int64.
        size: Number of positions per row.
    """

    starts: torch.Tensor
    size: int

    def columns(self) -> torch.Tensor:
        """Return the positions, shape (b, size), int64."""
        return self.starts[:, None] + torch.arange(self.size, device=self.starts.device)

    def mask(self, length: int) -> torch.Tensor:
        """Return a mask that is True inside the window, shape (b, length)."""
        columns = torch.arange(length, device=self.starts.device)
        begin = self.starts[:, None]
        return (columns >= begin) & (columns < begin + self.size)


def token_positions(
    split: EncodedSplit, sequences: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return where the tokens of sequences are in a flat array, and True where there is a token.

    Both have shape (b, t); positions beyond a sequence's end are 0.
    """
    return _positions(split.offsets, sequences)


def token_cells(split: EncodedSplit, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where the tokens of sequences are in a flat array, -1 for padding, shape (b, t)."""
    positions, is_token = token_positions(split, sequences)
    return np.where(is_token, positions, -1)


def _positions(
    offsets: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    lengths = offsets[rows + 1] - offsets[rows]
    columns = np.arange(int(lengths.max()))
    is_value = columns < lengths[:, None]
    return np.where(is_value, offsets[rows][:, None] + columns, 0), is_value


def collate(
    data: TaskData, split: SplitName, rows: NDArray[np.int64], device: str | torch.device = "cpu"
) -> Batch:
    """Return the batch of these rows.

    Args:
        data: Encoded data.
        split: Name of the split.
        rows: Positions in the split, shape (b,), at least one.
        device: Device of the tensors.
    """
    source = data.splits[split]
    per_row = source.sequences_per_row
    sequences = (rows[:, None] * per_row + np.arange(per_row)).ravel()
    arrays: dict[str, NDArray[Any]] = {}

    def add(name: str, array: NDArray[Any]) -> None:
        kind = np.float32 if np.issubdtype(array.dtype, np.floating) else np.int64
        arrays[name] = np.ascontiguousarray(array, dtype=kind)

    if source.has_tokens:
        positions, is_token = token_positions(source, sequences)
        add("input_ids", np.where(is_token, source.tokens[positions], data.pad_id))
        add("attention_mask", is_token)
        for name, flat in source.token_arrays.items():
            add(name, np.where(is_token, flat[positions], _fill(name)))
    for name, values in source.row_arrays.items():
        picked = values[rows]
        if name in source.palettes:
            picked = _looked_up(source.palettes[name], picked)
        add(name, picked)
    for name, ragged in source.ragged.items():
        positions, is_value = _positions(ragged.offsets, rows)
        add(name, np.where(is_value, ragged.values[positions], _fill(name)))
    tensors = sent_together(arrays, device)
    return Batch(split, rows, sequences, tensors, data.input_names, arrays)


def _looked_up(palette: NDArray[np.float32], codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the numbers that bytes stand for, shape as `codes`: (b, channels, ...)."""
    found = np.empty(codes.shape, dtype=np.float32)
    for channel, numbers in enumerate(palette):
        found[:, channel] = numbers[codes[:, channel]]
    return found


def _fill(name: str) -> int:
    return IGNORED if name == "labels" else 0
