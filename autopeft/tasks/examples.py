"""Cleaned rows of a source, still as Python values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Examples:
    """Cleaned rows of one source.

    Attributes:
        columns: Role (such as "text" or "label") -> one value per row.
        source_rows: Index of each row in its source, shape (n_rows,).
        source: File name, or hub id and split.
        dropped: Reason -> number of rows that were left out for it.
        notes: What else was noticed, one sentence each.

    Example:
        >>> texts = {"text": ["good", "", "bad"]}
        >>> rows = autopeft.Examples.kept(texts, [None, "the text is missing", None], "a.csv")
        >>> rows["text"], rows.source_rows.tolist(), dict(rows.dropped)
        (('good', 'bad'), [0, 2], {'the text is missing': 1})
    """

    columns: Mapping[str, tuple[Any, ...]]
    source_rows: NDArray[np.int64]
    source: str
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def kept(
        cls,
        columns: Mapping[str, Sequence[Any]],
        problems: Sequence[str | None],
        source: str,
        notes: tuple[str, ...] = (),
    ) -> Examples:
        """Return the rows of a source that have no problem, and count the others.

        Args:
            columns: Role -> one value per row of the source.
            problems: Why a row is left out; None: it is kept.
            source: Name of the source.
            notes: What else was noticed.
        """
        index = np.asarray([i for i, problem in enumerate(problems) if problem is None], np.int64)
        counts = Counter(problem for problem in problems if problem is not None)
        every = cls(
            {role: tuple(values) for role, values in columns.items()},
            np.arange(len(problems), dtype=np.int64),
            source,
            dict(counts),
            notes,
        )
        return every.take(index)

    def __len__(self) -> int:
        return len(self.source_rows)

    def __getitem__(self, role: str) -> tuple[Any, ...]:
        return self.columns[role]

    def take(self, index: NDArray[np.int64]) -> Examples:
        """Return the rows at these positions."""
        pick = index.tolist()
        return Examples(
            {role: tuple(values[i] for i in pick) for role, values in self.columns.items()},
            self.source_rows[index],
            self.source,
            self.dropped,
            self.notes,
        )

    def keys(self, *roles: str) -> list[Hashable]:
        """Return each row's identity; letter case and spacing of texts do not count.

        Args:
            roles: The columns that make the identity; none: all of them.
        """
        values = [self.columns[role] for role in roles or self.columns]
        return [tuple(_identity(cell) for cell in row) for row in zip(*values, strict=True)]


def _identity(value: Any) -> Hashable:
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    if isinstance(value, Mapping):
        return tuple((str(key), _identity(item)) for key, item in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(_identity, value))
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    return value if isinstance(value, Hashable) else repr(value)


def is_missing(value: Any) -> bool:
    """Return whether a cell holds nothing: None, NaN, an empty text or an empty list.

    Example:
        >>> from autopeft.tasks.examples import is_missing
        >>> [is_missing(value) for value in (None, float("nan"), " ", [], 0, False)]
        [True, True, True, True, False, False]
    """
    if value is None or (isinstance(value, float) and value != value):
        return True
    if isinstance(value, str):
        return not value.strip()
    return isinstance(value, list | tuple | dict) and not value
