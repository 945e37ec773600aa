"""Columns of a task: which of a source's columns it reads, and whether their cells fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from autopeft.errors import DataError
from autopeft.tasks.cells import kind_of
from autopeft.tasks.examples import is_missing
from autopeft.tasks.labels import list_in
from autopeft.tasks.reading import Table

Kind = Literal["text", "label", "number", "labels", "tokens", "messages", "image", "audio", "any"]


FILE_NAMES = ("file_name", "filename", "file", "path", "file_path", "image_path", "audio_path")
"""Names of columns with the files of images or sounds."""


@dataclass(frozen=True)
class Column:
    """A column that a task reads.

    Attributes:
        role: What it means to the task, and its name in the setting `columns`: "text", "label".
        kind: What its cells must be.
        help: One line for `autopeft tasks`.
        is_required: Whether the task cannot do without it.
        names: Names by which it is recognized, the best first; the role is always one.

    Example:
        >>> autopeft.Column("label", "number", "the stars", names=("stars",)).all_names
        ('label', 'stars')
    """

    role: str
    kind: Kind
    help: str
    is_required: bool = True
    names: tuple[str, ...] = ()

    @property
    def all_names(self) -> tuple[str, ...]:
        """Every name by which it is recognized."""
        return (self.role, *(name for name in self.names if name != self.role))


def find_columns(
    columns: Sequence[Column], named: Mapping[str, str], table: Table
) -> dict[str, str]:
    """Return the source's column for each role that it has.

    Args:
        columns: The columns of a task.
        named: Role -> column, as the settings name them.
        table: The source.

    Raises:
        DataError: if a named column is missing, or a required one is not recognized.
    """
    found: dict[str, str] = {}
    present = {name.casefold(): name for name in reversed(table.column_names)}
    for column in columns:
        wanted = named.get(column.role)
        if wanted is not None:
            if wanted not in table.column_names:
                raise DataError(
                    column.role,
                    wanted,
                    f"no such column in {table.source}",
                    f"its columns are {', '.join(map(repr, table.column_names)) or 'none'}",
                )
            found[column.role] = wanted
            continue
        taken = {*found.values(), *named.values()}
        names = (present.get(name.casefold()) for name in column.all_names)
        name = next((name for name in names if name is not None and name not in taken), None)
        if name is not None:
            found[column.role] = name
        elif column.is_required:
            raise DataError(
                column.role,
                "",
                f"no column of {table.source} is recognized as {column.help}",
                f"name one of {', '.join(map(repr, table.column_names)) or 'none'} "
                f"with --columns {column.role}=NAME",
            )
    return found


def check_kind(column: Column, name: str, table: Table, values: Sequence[Any]) -> None:
    """Raise a DataError, naming the row, if a cell is not of its column's kind."""
    fits = _FITS.get(column.kind)
    if fits is None:
        return
    for row, value in enumerate(values):
        if not is_missing(value) and not fits(value):
            raise DataError(
                column.role,
                name,
                f"row {row + 1} of {table.source} holds {_described(value)} where "
                f"{_MEANING[column.kind]} is expected",
                _REMEDIES.get(column.kind, _ANOTHER),
            )


_ANOTHER = "name another column, or another --task (see `autopeft tasks`)"
_REMEDIES: Mapping[str, str] = {
    "number": f"write numbers such as 4.5, leave unknown ones empty, or {_ANOTHER}"
}


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, int | float)


def _are(kinds: type | tuple[type, ...]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list | tuple) and all(isinstance(item, kinds) for item in value)
    )


_FITS: Mapping[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "label": lambda value: isinstance(value, str | bool | int | float),
    "number": _is_number,
    "labels": _are((str, int)),
    "tokens": _are((str, int)),
    "messages": lambda value: _are(dict)(list_in(value) if isinstance(value, str) else value),
}

_MEANING: Mapping[str, str] = {
    "text": "text",
    "label": "one label",
    "number": "a number",
    "labels": "a list of labels",
    "tokens": "a list",
    "messages": "a list of messages",
}


def _described(value: Any) -> str:
    shown = " ".join(repr(value).split())
    return f"{kind_of(value)} ({shown[:60]}{'...' if len(shown) > 60 else ''})"
