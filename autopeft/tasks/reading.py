"""Reads rows from files, folders, hub datasets and objects in memory."""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autopeft.errors import DataError
from autopeft.tasks.csv_layout import FileError, check_names
from autopeft.tasks.file_bytes import MAX_BYTES, file_suffix
from autopeft.tasks.files import (
    Columns,
    check_arrow,
    dataset_columns,
    is_data_file,
    read_columns,
    reason,
    row_columns,
    sound_feature,
)
from autopeft.tasks.labels import mapping_in
from autopeft.utils.formatting import counted
from autopeft.utils.online import offline_if_unreachable
from autopeft.utils.quiet import quiet_datasets
from autopeft.utils.scratch import scratch_folder

KINDS = "a CSV, TSV, JSON, JSONL, Parquet, Arrow, CoNLL or text file"
"""Files that can be read, for messages."""

_READ_BY_US = {"csv", "json", "parquet", "text", "conll"}
"""Kinds of folders whose files are read one by one, so that a cell means the same everywhere."""


@dataclass(frozen=True)
class Table:
    """All rows of a source.

    Attributes:
        source: File name, or hub id and split.
        columns: Column name -> one Python value per row; None if a row has no value.
        notes: What was noticed when reading (separator, encoding, quotes), one sentence each.
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


def read(
    field: str,
    source: Any,
    *,
    name: str | None = None,
    revision: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> dict[str, Table]:
    """Return the splits of a source; what has none is the split "train".

    Files may be compressed (gz, bz2, xz, zip). Cells stay what they are in the source; those of a
    CSV file are text. None, NaN and empty text mean that a row has no value, in whatever container.

    Files and folders leave nothing in a cache; hub datasets are kept in the cache of `datasets`.

    Args:
        field: The setting that names the source, for errors.
        source: A file, a pattern such as "data/*.jsonl", a folder (also of images, or written by
            `save_to_disk`), a hub id, or a list of files; or a `datasets.Dataset` or `DatasetDict`,
            a pandas DataFrame, or a list of dicts.
        name: Subset of a hub dataset.
        revision: Revision of a hub dataset.
        max_bytes: Largest file that is read, after decompression.

    Raises:
        DataError: if it cannot be read or has no rows.

    Example:
        >>> from autopeft.tasks.reading import read
        >>> table = read("data", [{"text": "good", "label": 1}, {"text": "bad"}])["train"]
        >>> table.n_rows, table.columns["label"]
        (2, [1, None])
    """
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    try:
        found = _read(field, source, name, revision, max_bytes)
    except FileError as error:
        raise DataError(field, _shown(source), error.problem, error.remedy) from error
    except OSError as error:
        raise DataError(
            field,
            _shown(source),
            f"cannot be read ({error.strerror or error})",
            "check that this user may read it, or copy it elsewhere",
        ) from error
    if not any(table.n_rows for table in found.values()):
        raise DataError(field, _shown(source), "there are no rows in it", "use one with data")
    return {split: _cleaned(table) for split, table in found.items()}


def _read(
    field: str, source: Any, name: str | None, revision: str | None, max_bytes: int
) -> dict[str, Table]:
    if not isinstance(source, str):
        _refuse_hub_settings(name, revision)
        if _is_list_of(source, (str, os.PathLike)):
            files = [Path(each).expanduser() for each in source]
            return {"train": _read_files(files, max_bytes, is_named=False)}
        return _read_object(field, source)
    if not source.strip():
        raise FileError("no data given", "name a file, a folder or a hub dataset")
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(field, path, name, max_bytes)
    if path.is_file():
        _refuse_hub_settings(name, revision)
        return {"train": _read_files([path], max_bytes, is_named=True)}
    _refuse_special(path)
    if glob.has_magic(source):
        matches = sorted(glob.glob(str(path), recursive=True))
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            raise FileError("no file has such a name", f"check the pattern{_here(path)}")
        return {"train": _read_files(files, max_bytes, is_named=False)}
    if "://" in source:
        raise FileError(
            "is a web address", "download it and name the file, or give a hub id such as owner/name"
        )
    if _is_path(source):
        raise FileError("no such file or folder", f"check the path{_alike(path)}")
    return _read_hub(field, source, name, revision)


def _refuse_special(path: Path) -> None:
    """Raise a FileError for a pipe, device or socket: none can be read twice, and some never end.

    What is no file at all, or cannot be looked at, passes.
    """
    try:
        is_special = path.exists() and not path.is_file() and not path.is_dir()
    except (OSError, ValueError):
        return
    if is_special:
        raise FileError("is a pipe or device, not a file", "write its rows to a file and name that")


def _is_path(source: str) -> bool:
    """Return whether a source that does not exist was meant as a path, not as a hub id."""
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and source[0] not in "."
    return not is_hub_id or is_data_file(Path(source))


def _alike(path: Path) -> str:
    """Return a hint at a file whose name is nearly this one."""
    try:
        names = [each.name for each in path.parent.iterdir()]
    except OSError:
        return _here(path)
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" (there is {close[0]!r})" if close else _here(path)


def _here(path: Path) -> str:
    return "" if path.is_absolute() else " (it is relative to the current folder)"


def _refuse_hub_settings(name: str | None, revision: str | None) -> None:
    for setting, value in (("data_name", name), ("data_revision", revision)):
        if value is not None:
            raise DataError(setting, value, "is only for hub datasets", "leave it out")


def _is_list_of(source: Any, kinds: tuple[type, ...]) -> bool:
    return (
        isinstance(source, list | tuple)
        and len(source) > 0
        and all(isinstance(each, kinds) for each in source)
    )


def _shown(source: Any) -> str:
    """Return how an error shows a source."""
    if isinstance(source, str):
        return source
    if _is_list_of(source, (str, os.PathLike)):
        return _joined([Path(each) for each in source])
    return type(source).__name__


def _joined(paths: Sequence[Path]) -> str:
    more = len(paths) - 1
    return paths[0].name + (f" and {counted(more, 'more file')}" if more else "")


# Files and folders


def _read_files(paths: Sequence[Path], max_bytes: int, *, is_named: bool) -> Table:
    """Return the rows of files, one file after another.

    Args:
        paths: The files.
        max_bytes: Largest file that is read, after decompression.
        is_named: Whether the source is the name of the only file, so that errors need not tell it.
    """
    parts = [_read_one(path, max_bytes, is_named) for path in paths]
    names = list(dict.fromkeys(name for columns, _ in parts for name in columns))
    notes = [note for _, notes in parts for note in notes]
    for path, (columns, _) in zip(paths, parts, strict=True):
        lacking = [name for name in names if name not in columns]
        if not lacking:
            continue
        if not file_suffix(path).startswith((".json", ".ndjson")):
            raise FileError(
                f"{path.name} has no column {lacking[0]!r}, which other files have",
                "give all files the same columns, or name fewer files",
            )
        notes.append(f"{path.name}: no row has the field {lacking[0]!r}, which other files have")
    if len(parts) == 1:
        return Table(paths[0].name, parts[0][0], tuple(notes))
    joined: dict[str, list[Any]] = {name: [] for name in names}
    for columns, _ in parts:
        n_rows = len(next(iter(columns.values()), ()))
        for name in names:
            joined[name].extend(columns.get(name, [None] * n_rows))
    return Table(_joined(paths), joined, tuple(dict.fromkeys(notes)))


def _read_one(path: Path, max_bytes: int, is_named: bool) -> tuple[Columns, tuple[str, ...]]:
    if not path.is_file():
        _refuse_special(path)
        raise FileError(f"there is no file {str(path)!r}", f"check the path{_alike(path)}")
    try:
        return read_columns(path, max_bytes)
    except FileError as error:
        if is_named:
            raise
        raise FileError(f"{path.name} {error.problem}", error.remedy) from error


def _read_folder(field: str, folder: Path, name: str | None, max_bytes: int) -> dict[str, Table]:
    """Return the splits of a folder, as datasets finds them by the names of files and folders."""
    import datasets

    folder = folder.resolve()
    if not folder.name:
        raise FileError("is the root of the file system", "name a folder of data")
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        try:
            for state in folder.rglob("state.json"):
                # Only its own: caches of datasets may lie beside them.
                for file in json.loads(state.read_bytes()).get("_data_files", ()):
                    check_arrow(state.parent / file["filename"])
            saved = datasets.load_from_disk(str(folder))
        except Exception as error:  # of Arrow, json and the file system
            raise FileError(
                f"was written by save_to_disk but cannot be read ({reason(error)})",
                "copy the whole folder again, or write it again with save_to_disk",
            ) from error
        return _splits(field, saved, folder.name)
    with scratch_folder() as scratch, quiet_datasets():
        cache = str(scratch / "datasets")
        try:
            builder = datasets.load_dataset_builder(str(folder), name, cache_dir=cache)
            kind = str(type(builder).__module__).rsplit(".", 1)[-1]
            if kind == "audiofolder":
                builder.BASE_FEATURE = sound_feature()
            files = builder.config.data_files
            if kind not in _READ_BY_US or not files:
                # `load_dataset` would look for all files once more.
                builder.download_and_prepare()
                loaded = builder.as_dataset(in_memory=True)
                files = None
        except Exception as error:  # datasets raises any exception of its readers
            raise FileError(
                f"is a folder that datasets cannot read ({reason(error)})",
                "set data_name to one of its subsets"
                if "BuilderConfig" in str(error) or "Config name" in str(error)
                else "give files of one kind, named train, validation and test, or a folder of "
                "images or sounds for each label",
            ) from error
    if files is None:
        return _splits(field, loaded, folder.name)
    tables = {
        str(split): _read_files([Path(each) for each in files[split]], max_bytes, is_named=False)
        for split in files
    }
    paths = [str(each) for split in files for each in files[split]]
    used = {Path(each).resolve() for each in paths}
    rest = _unused(folder, used)
    is_named = any("train" in each.removeprefix(str(folder)) for each in paths)
    if list(tables) == ["train"] and not is_named:
        _check_other_kinds(rest, used, set(tables["train"].columns), max_bytes)
    notes = _left_out(folder, rest, used)
    return {
        split: Table(f"{folder.name}:{split}", table.columns, (*table.notes, *notes))
        for split, table in tables.items()
    }


def _unused(folder: Path, used: set[Path]) -> list[Path]:
    """Return the data files of a folder that are not among those used."""
    others = [path for path in folder.rglob("*") if path.is_file() and is_data_file(path)]
    return sorted((p for p in others if p.resolve() not in used), key=lambda path: path.name)


def _check_other_kinds(
    rest: Sequence[Path], used: set[Path], columns: set[str], max_bytes: int
) -> None:
    """Raise a FileError if files of another kind have the same columns.

    Where no name tells splits, datasets takes the files of one kind: the most frequent one, or any.
    """
    for path in rest:
        if file_suffix(path) in {".txt", *map(file_suffix, used)}:
            continue
        try:
            found, _ = read_columns(path, max_bytes)
        except FileError:
            continue  # Perhaps no data.
        if set(found) == columns:
            one = min(each.name for each in used)
            raise FileError(
                f"has the same columns in files of two kinds, {one} and {path.name}",
                "name all of them, as a list or by a pattern such as 'folder/*', or keep one kind",
            )


def _left_out(folder: Path, rest: Sequence[Path], used: set[Path]) -> tuple[str, ...]:
    """Return notes of the data files that are not used."""
    kinds = sorted({file_suffix(path) for path in used})
    others = [path.name for path in rest if file_suffix(path) not in kinds]
    alike = [path.name for path in rest if file_suffix(path) in kinds]
    reasons = (
        (alike, "splits are in other files"),
        (others, f"rows are in files of one kind ({', '.join(kinds)})"),
    )
    return tuple(
        f"{folder.name}: {_first(names)} left out, because the folder's {why}"
        for names, why in reasons
        if names
    )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# Hub


def _read_hub(field: str, source: str, name: str | None, revision: str | None) -> dict[str, Table]:
    """Return every split of a hub dataset."""
    import datasets

    try:
        with quiet_datasets(), offline_if_unreachable():
            loaded = datasets.load_dataset(source, name, revision=revision)
    except Exception as error:
        # load_dataset raises any exception of its readers, the network and the hub client.
        why = reason(error)
        raise DataError(
            field,
            source,
            f"neither a file here nor a dataset that can be loaded ({why})",
            _hub_remedy(why),
        ) from error
    return _splits(field, loaded, source)


def _hub_remedy(why: str) -> str:
    lowered = why.casefold()
    if "torchcodec" in lowered:
        return "pip install torchcodec, or download its files and name their folder"
    if "gated" in lowered:
        return "accept its terms on its hub page, then log in with `hf auth login`"
    if "config name is missing" in lowered or "builderconfig" in lowered:
        return "set data_name to one of its subsets"
    if "script" in lowered:
        return "use the hub's Parquet copy of it: data_revision=refs/convert/parquet"
    if any(word in lowered for word in ("offline", "connect", "network", "reach", "timed out")):
        return "check the name and the network; a dataset loaded once is read from the cache"
    return "check the name, the subset (data_name) and the network, or name a file"


# Objects


def _read_object(field: str, source: Any) -> dict[str, Table]:
    # What has not been imported cannot be given.
    datasets: Any = sys.modules.get("datasets")
    pandas: Any = sys.modules.get("pandas")
    if datasets is not None:
        if isinstance(source, datasets.IterableDataset | datasets.IterableDatasetDict):
            raise FileError(
                "is read as a stream, but a search reads rows several times",
                "load it without streaming, or take a part: "
                "datasets.Dataset.from_list(list(data.take(10_000)))",
            )
        if isinstance(source, datasets.Dataset | datasets.DatasetDict):
            return _splits(field, source, "Dataset")
    if pandas is not None and isinstance(source, pandas.DataFrame):
        check_names([str(name) for name in source.columns])
        columns = {str(n): source.iloc[:, i].tolist() for i, n in enumerate(source.columns)}
        return {"train": Table("DataFrame", columns)}
    if isinstance(source, list | tuple):
        rows = [(f"row {number}", row) for number, row in enumerate(source, start=1)]
        return {"train": Table("list", row_columns(rows))}
    if isinstance(source, Mapping):
        remedy = "use datasets.DatasetDict for splits, or datasets.Dataset.from_dict for columns"
    elif hasattr(source, "to_pandas"):
        remedy = "convert it with .to_pandas()"
    else:
        remedy = f"give {KINDS}, a hub id, a Dataset, a DataFrame or a list of dicts"
    raise FileError("is not data that can be read", remedy)


def _splits(field: str, loaded: Any, source: str) -> dict[str, Table]:
    if not isinstance(loaded, Mapping):
        return {"train": Table(source, _dataset(field, loaded, source))}
    return {
        str(split): Table(f"{source}:{split}", _dataset(field, rows, f"{source}:{split}"))
        for split, rows in loaded.items()
    }


def _dataset(field: str, rows: Any, source: str) -> Columns:
    try:
        return dataset_columns(rows)
    except FileError as error:
        raise DataError(field, source, error.problem, error.remedy) from error


# Cells


def _cleaned(table: Table) -> Table:
    """Return a table with plain Python values, and None where there is none."""
    columns = {
        name: [_python(value) for value in values] if isinstance(values, list) else values
        for name, values in table.columns.items()
    }
    return Table(table.source, {**_by_language(columns), **columns}, table.notes)


TRANSLATION = "translation"
"""Name of the column in which data sets of translations keep a text for each language."""


def languages(columns: Columns) -> tuple[str, ...]:
    """Return the languages of a column of translations, as its first row has them; () if none."""
    first = next((cell for cell in columns.get(TRANSLATION, ()) if cell is not None), None)
    return tuple(map(str, mapping_in(first) or ()))


def _by_language(columns: Columns) -> Columns:
    """Return the texts of each language of a column of translations, as a column of its own."""
    cells = [mapping_in(cell) or {} for cell in columns.get(TRANSLATION, ())]
    return {name: [cell.get(name) for cell in cells] for name in languages(columns)}


def _python(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return None if value != value else value
    if isinstance(value, np.ndarray):
        return [_python(item) for item in value.tolist()] if value.ndim == 1 else value
    kind = type(value).__name__
    if kind in {"NAType", "NaTType"}:  # of pandas
        return None
    return float(value) if kind == "Decimal" else value
