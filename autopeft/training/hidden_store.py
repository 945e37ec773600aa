"""Hidden states of the rows of a split, kept in memory or in a file that workers share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from autopeft.tasks.data import EncodedSplit


class HiddenStore:
    """One hidden state a token, laid end to end like the split's tokens; filled row by row.

    With a file, every process that opens it sees the rows that any of them has filled. Two that
    fill the same row at once write the same values, so no lock is needed; a row is marked as
    filled only after its values are written.

    Args:
        split: Whose rows.
        width: Size of a hidden state.
        dtype: What is stored: float32, or bfloat16 at half the size.
        device: Where it is kept if not in a file.
        path: File to map; None for memory of this process.
    """

    def __init__(
        self,
        split: EncodedSplit,
        width: int,
        *,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        path: Path | None = None,
    ) -> None:
        self._split = split
        n_tokens = len(split.tokens)
        # Allocated outside of inference mode, where it might have been asked for: what is
        # allocated inside could not be written to by a training.
        with torch.inference_mode(False):
            if path is None:
                self._states = torch.empty(n_tokens, width, dtype=dtype, device=device)
                self._filled = torch.zeros(len(split), dtype=torch.uint8)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._states = torch.from_file(
                    str(path), shared=True, size=n_tokens * width, dtype=dtype
                ).view(n_tokens, width)
                self._filled = torch.from_file(
                    f"{path}.filled", shared=True, size=len(split), dtype=torch.uint8
                )
        self._is_filled: NDArray[np.uint8] = self._filled.numpy()

    @staticmethod
    def n_bytes(split: EncodedSplit, width: int, dtype: torch.dtype) -> int:
        """What a store of this split takes."""
        return len(split.tokens) * width * dtype.itemsize

    def missing(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the rows that are not filled yet."""
        is_missing: NDArray[np.bool_] = self._is_filled[rows] == 0
        return rows[is_missing]

    def put(self, rows: NDArray[np.int64], hidden: torch.Tensor) -> None:
        """Fills rows.

        Args:
            rows: Positions in the split, shape (b,).
            hidden: Their hidden states, padded on the right, shape (b, t, width).
        """
        positions, is_token = self._positions(rows)
        tokens = torch.from_numpy(is_token).to(hidden.device)
        self._states[positions[is_token]] = hidden[tokens].to(
            self._states.device, self._states.dtype
        )
        self._is_filled[rows] = 1

    def get(
        self, rows: NDArray[np.int64], device: str | torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        """Hidden states of filled rows, shape (b, t, width), zero beyond a row's end."""
        positions, is_token = self._positions(rows)
        flat = torch.from_numpy(positions.ravel()).to(self._states.device)
        hidden = self._states.index_select(0, flat).to(device, dtype)
        hidden = hidden.view(*positions.shape, -1)
        # Not left as found: padding is masked by a weight of 0, and 0 times garbage may be NaN.
        padding = torch.from_numpy(~is_token).to(device)
        return hidden.masked_fill(padding[..., None], 0.0)

    def _positions(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Place of each token in the flat store, shape (b, t), and True where there is one."""
        lengths = self._split.lengths[rows]
        columns = np.arange(int(lengths.max()))
        is_token = columns < lengths[:, None]
        return np.where(is_token, self._split.offsets[rows][:, None] + columns, 0), is_token
