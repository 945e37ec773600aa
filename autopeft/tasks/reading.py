"""Reads rows from a CSV, TSV, JSONL, JSON or Parquet file, or from a hub dataset."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from autopeft.errors import DataError
from autopeft.utils.quiet import quiet_datasets

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Table:
    """All rows of a source.

    Attributes:
        source: File name, or hub id and split.
        columns: Column name -> one value per row; None if a row has no value.
    """

    source: str
    columns: Columns
    notes: tuple[str, ...] = ()

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return list(self.columns)

    def head(self, name: str) -> Sequence[Any]:
        """Return the first values of a column."""
        return self.columns[name][:100]

    @property
    def n_rows(self) -> int:
        """Number of rows, empty ones included."""
        return len(next(iter(self.columns.values()), ()))

    def column(self, field: str, name: str) -> Sequence[Any]:
        """Return the column that the setting `field` names; raise a DataError if it is missing."""
        if name not in self.columns:
            found = ", ".join(map(repr, self.columns)) or "none"
            raise DataError(
                field, name, f"no such column in {self.source}", f"its columns are {found}"
            )
        return self.columns[name]


def _read_csv(path: Path) -> Columns:
    # Everything is read as text. "NA", "None" and "null" are words and may be labels.
    separator = "\t" if ".tsv" in path.suffixes else ","
    frame = pd.read_csv(path, dtype=str, keep_default_na=False, sep=separator)
    return {str(name): frame[name].tolist() for name in frame.columns}


def _read_parquet(path: Path) -> Columns:
    import pyarrow.parquet as parquet

    return dict(parquet.read_table(path).to_pydict())


def _read_jsonl(path: Path) -> Columns:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise ValueError(f"line {number} is not JSON ({error})") from error
    return _columns_of(rows)


def _read_json(path: Path) -> Columns:
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list):
        raise ValueError("the file does not hold a list of rows")
    return _columns_of(rows)


def _columns_of(rows: Sequence[Any]) -> Columns:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is not an object with named fields")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


_READERS: Mapping[str, Callable[[Path], Columns]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _reader(path: Path) -> Callable[[Path], Columns] | None:
    suffixes = [s for s in path.suffixes if s not in {".gz", ".bz2", ".xz", ".zip"}]
    return _READERS.get(suffixes[-1].lower()) if suffixes else None


def is_file_name(source: str) -> bool:
    """Return whether a source is named like a file (which may be missing), not a hub dataset."""
    path = Path(source).expanduser()
    return path.is_file() or _reader(path) is not None


def read_file(field: str, source: str) -> Table:
    """Return all rows of a file.

    Args:
        field: The setting that names the file, for errors.
        source: The file's path; "~" is the home folder.

    Raises:
        DataError: if the file is missing, of an unknown kind, unreadable or without rows.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(field, source, "no such file", "check the path")
    reader = _reader(path)
    if reader is None:
        raise DataError(field, source, "unknown kind of file", f"use one of {', '.join(_READERS)}")
    try:
        columns = reader(path)
    except (OSError, ValueError, KeyError) as error:
        # pandas' and pyarrow's errors are ValueErrors too.
        reason = " ".join(str(error).split())
        raise DataError(field, source, f"cannot be read: {reason}", "repair the file") from error
    table = Table(path.name, columns)
    if table.n_rows == 0:
        raise DataError(field, source, "the file has no rows", "use a file with data")
    return table


def read_hub(source: str, name: str | None, revision: str | None) -> dict[str, Table]:
    """Return every split of a hub dataset, or of a folder that `datasets.load_dataset` reads.

    Class labels become names, and unknown ones (-1, as in hidden test sets) None.

    Raises:
        DataError: if it cannot be loaded.
    """
    import datasets

    try:
        with quiet_datasets():
            loaded = datasets.load_dataset(source, name, revision=revision)
    except Exception as error:
        # load_dataset raises any exception of its readers, the network and the hub client.
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            "data",
            source,
            f"neither a file here nor a dataset that can be loaded ({reason})",
            "check the name, the subset (data_name) and the network",
        ) from error
    return {str(split): _hub_table(f"{source}:{split}", rows) for split, rows in loaded.items()}


def _hub_table(source: str, rows: Any) -> Table:
    columns: dict[str, Sequence[Any]] = {}
    for name, feature in rows.features.items():
        values = list(rows[name])
        names = getattr(feature, "names", None)
        if names is not None and hasattr(feature, "int2str"):
            values = [names[v] if v is not None and v >= 0 else None for v in values]
        columns[str(name)] = values
    return Table(source, columns)
