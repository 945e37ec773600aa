"""Reads a table of recorded scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from autopeft.comparing.recorded import Line
from autopeft.errors import DataError, SettingsError
from autopeft.tasks.columns import Column, find_columns
from autopeft.tasks.reading import Table, read

_COLUMNS = (
    Column("name", "text", "what was trained", names=("method", "adapter", "experiment_name")),
    Column("score", "number", "its score", names=("accuracy", "test_accuracy", "test accuracy")),
    Column("rows", "number", "its test rows", False, names=("n_rows", "test_rows")),
    Column("seeds", "number", "its seeds", False, names=("n_seeds", "confirm_seeds")),
)


def read_lines(
    source: Any, *, rows: int | None = None, columns: Mapping[str, str] | None = None
) -> tuple[Line, ...]:
    """Return the lines of a table with the columns name and score, and perhaps rows and seeds.

    Args:
        source: A file, or what `autopeft.search` takes as data.
        rows: Test rows of the lines that do not tell; None: all of them do.
        columns: Role -> column, for columns of other names.

    Raises:
        DataError: if a column is missing, or a cell is no number or no share.
        SettingsError: if the number of test rows is not known.
    """
    tables = read("table", source)
    table = next(iter(tables.values()))
    if rows is not None and rows < 2:
        raise SettingsError("rows", rows, "`rows >= 2` must hold", "give the number of test rows")
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
    return lines


def _lines(table: Table, found: Mapping[str, str], rows: int | None) -> Iterator[Line]:
    def numbers(role: str) -> list[float | None]:
        if role not in found:
            return [None] * table.n_rows
        return [_number(table, role, v, i) for i, v in enumerate(table.columns[found[role]], 1)]

    scores = [_known(table, "score", value, i) for i, value in enumerate(numbers("score"), 1)]
    if min(scores, default=0.0) < 0 or max(scores, default=0.0) > 100:
        problem = "holds scores below 0 or above 100, whose error nobody can tell from the rows"
        raise DataError("score", found["score"], problem, "give shares of rows, such as accuracies")
    is_percent = max(scores, default=0.0) > 1
    n_rows, n_seeds = numbers("rows"), numbers("seeds")
    names = table.columns[found["name"]]
    for i, (name, score, own, seeds) in enumerate(
        zip(names, scores, n_rows, n_seeds, strict=True), 1
    ):
        count = rows if own is None else int(own)
        if count is None:
            problem = f"line {i} of {table.source} does not tell its test rows"
            raise SettingsError("rows", None, problem, "give --rows N, or a column rows")
        if count < 2 or (seeds is not None and seeds < 1):
            problem = f"line {i} of {table.source} has {count} rows and {seeds} seeds"
            raise DataError("table", table.source, problem, "give 2 rows and 1 seed at least")
        yield Line(str(name), score / 100 if is_percent else score, count, int(seeds or 1))


def _number(table: Table, role: str, value: Any, line: int) -> float | None:
    if value is None or value == "":
        return None
    try:
        number = float(str(value).strip().removesuffix("%"))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        problem = f"line {line} of {table.source} is no number"
        raise DataError(role, value, problem, "correct it, or name another column")
    return number


def _known(table: Table, role: str, value: float | None, line: int) -> float:
    if value is None:
        problem = f"line {line} of {table.source} has none"
        raise DataError(role, "", problem, "fill it in, or leave the line out")
    return value
