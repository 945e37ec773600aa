"""Leaves out rows that the search's data have too: what is trained on says nothing of the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from autopeft.errors import DataError
from autopeft.tasks.reading import Table
from autopeft.utils.formatting import counted


def without_shared(
    field: str, table: Table, given: Iterable[Table], remedy: str, *, is_text: bool = False
) -> tuple[Table, NDArray[np.int64]]:
    """Return the rows that the search's data do not have, and where they are in the table.

    Rows are equal if they say the same, whatever their columns are called and in which order they
    are.

    Args:
        field: The setting that names the table, for errors.
        table: All rows.
        given: The sources of the search.
        remedy: What the user can do if none is left.
        is_text: Whether the text alone counts, however it is laid out: a chat, a prompt with its
            completion, and a line of both are equal.

    Raises:
        DataError: if the search's data have all of them.

    Example:
        >>> from autopeft.tasks.reading import read
        >>> own = read("data", [{"text": "good", "label": "1"}])["train"]
        >>> other = read("retain", [{"label": 1, "words": "good"}, {"words": "bad"}])["train"]
        >>> rows, places = without_shared("retain", other, [own], "give others")
        >>> rows.columns["words"], places.tolist()
        (['bad'], [1])
    """
    known = {key for other in given for key in _keys(other)}
    kept = [row for row, key in enumerate(_keys(table)) if key not in known]
    if is_text:
        said = {text for other in given for row in _texts(other) for text in (" ".join(row), *row)}
        rows = _texts(table)
        kept = [row for row in kept if not _is_said(rows[row], said)]
    places = np.array(kept, dtype=np.int64)
    if not kept:
        problem = f"all {counted(table.n_rows, 'row')} are also in the search's data"
        raise DataError(field, table.source, problem, remedy)
    if len(kept) == table.n_rows:
        return table, places
    columns = {name: [values[row] for row in kept] for name, values in table.columns.items()}
    return replace(table, columns=columns), places


def _keys(table: Table) -> list[str]:
    """Return what each row says, whatever its columns are called and in which order they are."""
    cells = zip(*table.columns.values(), strict=True)
    return [
        "\n".join(sorted(" ".join(str(cell).split()) for cell in row if cell is not None))
        for row in cells
    ]


_LEAST_WORDS = 4
"""A text of fewer words says too little to be told from another."""

_ROLES = ("role", "from")
"""Keys of a message that name who speaks."""


def _texts(table: Table) -> list[list[str]]:
    """Return the texts of each row in order, those inside of chats included."""
    return [list(_leaves(row)) for row in zip(*table.columns.values(), strict=True)]


def _leaves(cell: object) -> Iterator[str]:
    if isinstance(cell, str):
        if text := " ".join(cell.split()):
            yield text
    elif isinstance(cell, Mapping):
        for key, value in cell.items():
            if key not in _ROLES:
                yield from _leaves(value)
    elif isinstance(cell, Sequence):
        for value in cell:
            yield from _leaves(value)


def _is_said(texts: Sequence[str], said: Set[str]) -> bool:
    """Return whether a row's texts are known, as one or each by itself."""
    whole = " ".join(texts)
    long = [text for text in texts if _is_long(text)]
    return (_is_long(whole) and whole in said) or (bool(long) and all(t in said for t in long))


def _is_long(text: str) -> bool:
    return len(text.split()) >= _LEAST_WORDS
