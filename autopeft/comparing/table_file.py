"""Reads a table of recorded scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

from autopeft.comparing.recorded import Line
from autopeft.errors import DataError, SettingsError
from autopeft.tasks.cells import Cell, row_name, shown
from autopeft.tasks.columns import Column, find_columns
from autopeft.tasks.reading import Table, read

_COLUMNS = (
    Column("name", "text", "what was trained", names=("method", "adapter", "experiment_name")),
    Column("score", "number", "its score", names=("accuracy", "test_accuracy", "test accuracy")),
    Column("rows", "number", "its test rows", False, names=("n_rows", "test_rows")),
    Column("seeds", "number", "its seeds", False, names=("n_seeds", "confirm_seeds")),
)

_COUNTS = {"rows": (2, 10**12), "seeds": (1, 1000)}
"""Role -> least and largest number; a larger one is that of another column."""


def read_lines(
    source: Any, *, rows: int | None = None, columns: Mapping[str, str] | None = None
) -> tuple[Line, ...]:
    """Return the lines of a table with the columns name and score, and perhaps rows and seeds.

    Args:
        source: A file, or what `autopeft.search` takes as data.
        rows: Test rows of the lines that do not tell; None: all of them do.
        columns: Role -> column, for columns of other names.

    Raises:
        DataError: if a column is missing, a cell is empty, no number or no share, or lines of one
            name have unlike numbers of rows.
        SettingsError: if the number of test rows is not known.
    """
    tables = read("table", source)
    table = next(iter(tables.values()))
    least, most = _COUNTS["rows"]
    if rows is not None and not (is_number(rows) and least <= rows <= most and rows == int(rows)):
        problem = f"must be a whole number from {least} to {most:,}"
        raise SettingsError("rows", rows, problem, "give the number of test rows")
    named = dict(columns or {})
    roles = [column.role for column in _COLUMNS]
    for role in named:
        if role not in roles:
            problem = "a table of scores has no such column"
            raise SettingsError("columns", role, problem, f"name {', '.join(roles)}")
    found = find_columns(_COLUMNS, named, table)
    lines = tuple(_lines(table, found, rows))
    if len({line.name for line in lines}) < 2:
        problem = "holds fewer than two names to compare"
        raise DataError("table", table.source, problem, "give a line for each method")
    _check_rows(lines, table.source)
    return lines


def is_number(value: object) -> bool:
    """Return whether a value is a real number, of numpy too."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _lines(table: Table, found: Mapping[str, str], rows: int | None) -> Iterator[Line]:
    def cells(role: str) -> list[Cell]:
        column = found[role]
        values = enumerate(table.columns[column], 1)
        return [Cell(role, column, number, value, table.source) for number, value in values]

    def counts(role: str, default: int | None) -> list[int | None]:
        if role not in found:
            return [default] * table.n_rows
        return [default if cell.is_missing else _count(cell) for cell in cells(role)]

    names = [_written(cell) for cell in cells("name")]
    scores = _shares(cells("score"))
    n_rows, n_seeds = counts("rows", rows), counts("seeds", 1)
    for i, (name, score, own, seeds) in enumerate(
        zip(names, scores, n_rows, n_seeds, strict=True), 1
    ):
        if own is None:
            problem = f"{row_name(i, table.source)} does not tell its test rows"
            raise SettingsError("rows", None, problem, "give --rows N, or a column rows")
        yield Line(name, score, own, seeds or 1)


def _check_rows(lines: Sequence[Line], source: str) -> None:
    """Refuse lines of one name with unlike numbers of rows, whose mean has no binomial error."""
    known: dict[str, int] = {}
    for line in lines:
        first = known.setdefault(line.name, line.n_rows)
        if line.n_rows != first:
            problem = f"{line.name} has lines of {first:,} and of {line.n_rows:,} test rows"
            raise DataError("table", source, problem, "give them names of their own")


def _shares(cells: Sequence[Cell]) -> list[float]:
    """Return scores as shares.

    A number with a percent sign is a hundredth. Those without one are shares, and percentages if
    one of them is above 1.
    """
    written = [_written(cell) for cell in cells]
    is_signed = [text.endswith("%") for text in written]
    numbers = [_number(c, text.removesuffix("%")) for c, text in zip(cells, written, strict=True)]
    is_percent = any(n > 1 for n, signed in zip(numbers, is_signed, strict=True) if not signed)
    shares = []
    for cell, number, signed in zip(cells, numbers, is_signed, strict=True):
        if is_percent and not signed and 0 < number <= 1:
            problem = f"holds {shown(cell.value)} among percentages, which may be a share"
            cell.fail(problem, f"write {number:g}% or {100 * number:g}%")
        share = number / 100 if is_percent or signed else number
        if not 0 <= share <= 1:
            problem = f"holds {shown(cell.value)}, no share, whose error the rows do not tell"
            cell.fail(problem, "give shares of rows, such as accuracies: 0 to 1, or 0% to 100%")
        shares.append(share)
    return shares


def _written(cell: Cell) -> str:
    if cell.is_missing:
        cell.fail("has none", "fill it in, or leave the row out")
    return cell.text().strip()


def _count(cell: Cell) -> int:
    number = _number(cell, _written(cell))
    least, most = _COUNTS[cell.role]
    if not (number.is_integer() and least <= number <= most):
        problem = f"holds {shown(cell.value)}, no whole number from {least} to {most:,}"
        cell.fail(problem, "correct it, or name another column")
    return int(number)


def _number(cell: Cell, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        cell.fail(f"is no number ({shown(cell.value)})", "correct it, or name another column")
    return number
