"""Rows of a split as padded tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autopeft.tasks.data import EncodedSplit, SplitName, TaskData


@dataclass(frozen=True)
class Batch:
    """Some rows of one split, padded on the right to the longest of them.

    Attributes:
        split: Name of the split.
        rows: Positions of the rows in the split, shape (b,).
        input_ids: Shape (b, t), int64.
        attention_mask: Shape (b, t), int64: 1 for tokens, 0 for padding.
        targets: Shape (b,), int64: label index, or length of the prompt.
        type_ids: Shape (b, t), int64, or None.
    """

    split: SplitName
    rows: NDArray[np.int64]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    targets: torch.Tensor
    type_ids: torch.Tensor | None = None

    def model_inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of the model's forward."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.type_ids is not None:
            inputs["token_type_ids"] = self.type_ids
        return inputs


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
    split: EncodedSplit, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return where the tokens of rows are in a flat array, and True where there is a token.

    Both have shape (b, t); positions beyond a row's end are 0.
    """
    lengths = split.lengths[rows]
    columns = np.arange(int(lengths.max()))
    is_token = columns < lengths[:, None]
    return np.where(is_token, split.offsets[rows][:, None] + columns, 0), is_token


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
    positions, is_token = token_positions(source, rows)

    def tensor(array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(device, non_blocking=True)

    def padded(flat: NDArray[Any], fill: int) -> torch.Tensor:
        return tensor(np.where(is_token, flat[positions], fill))

    return Batch(
        split=split,
        rows=rows,
        input_ids=padded(source.tokens, data.pad_id),
        attention_mask=tensor(is_token),
        targets=tensor(source.targets[rows]),
        type_ids=None if source.type_ids is None else padded(source.type_ids, 0),
    )
