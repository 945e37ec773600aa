"""Cleaned rows of a source, still as text."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rows:
    """Cleaned rows of one source.

    Attributes:
        first: Text, or prompt.
        second: Second text of a pair; None if there are no pairs.
        target: Label name, or completion.
        source_rows: Index of each row in its source, shape (n_rows,).
        source: File name, or hub id and split.
    """

    first: tuple[str, ...]
    second: tuple[str, ...] | None
    target: tuple[str, ...]
    source_rows: NDArray[np.int64]
    source: str

    @classmethod
    def kept(
        cls,
        first: Sequence[str],
        second: Sequence[str] | None,
        target: Sequence[str],
        keep: Sequence[bool],
        source: str,
    ) -> Rows:
        """Return the rows of a source that are to be kept."""
        every = cls(
            tuple(first),
            None if second is None else tuple(second),
            tuple(target),
            np.arange(len(first), dtype=np.int64),
            source,
        )
        return every.take(np.flatnonzero(np.asarray(keep, dtype=bool)).astype(np.int64))

    def __len__(self) -> int:
        return len(self.first)

    def take(self, index: NDArray[np.int64]) -> Rows:
        """Return the rows at these positions."""
        pick = index.tolist()
        return Rows(
            tuple(self.first[i] for i in pick),
            None if self.second is None else tuple(self.second[i] for i in pick),
            tuple(self.target[i] for i in pick),
            self.source_rows[index],
            self.source,
        )

    def keys(self) -> list[Hashable]:
        """Return each row's identity; letter case and spacing do not count."""
        first = [_folded(a) or _folded(t) for a, t in zip(self.first, self.target, strict=True)]
        if self.second is None:
            return list(first)
        return [(a, _folded(b)) for a, b in zip(first, self.second, strict=True)]


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def as_texts(cells: Sequence[Any]) -> list[str]:
    """Return cells as text; a missing one is empty, a whole number loses its decimal point."""
    return [_as_text(cell) for cell in cells]


def _as_text(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
