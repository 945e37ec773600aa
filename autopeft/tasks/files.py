"""Reads the rows of one file: CSV, JSON, Parquet, Arrow, CoNLL or text, compressed or not."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autopeft.tasks.csv_layout import MAX_COLUMNS, FileError, check_names, csv_layout
from autopeft.tasks.file_bytes import (
    COMPRESSED,
    COPY_AGAIN,
    MAX_BYTES,
    check_bytes,
    check_size,
    decoded,
    decompressed,
    file_suffix,
)
from autopeft.utils.quiet import quiet_datasets
from autopeft.utils.scratch import scratch_folder
from autopeft.utils.text_files import Unreadable, check_depth, whole_number

Columns = Mapping[str, Sequence[Any]]
"""Column name -> one value per row."""


def is_data_file(path: Path) -> bool:
    """Return whether a path is named like a file that can be read."""
    return file_suffix(path) in _READERS or path.suffix.lower() in COMPRESSED


def read_columns(path: Path, max_bytes: int = MAX_BYTES) -> tuple[Columns, tuple[str, ...]]:
    """Return the columns of a file, and what was noticed when reading it.

    What `datasets` caches while it reads goes to a temporary folder that is removed.

    Raises:
        FileError: if it is of an unknown kind, damaged, larger than `max_bytes`, or its rows do not
            fit together.
    """
    check_size(path, max_bytes)
    with scratch_folder() as scratch:
        plain, notes = decompressed(path, scratch, list(_READERS), max_bytes)
        kind, *noted = _kind(plain)
        columns, more = _READERS[kind](_linked(plain, scratch), scratch, max_bytes)
    check_names(list(columns))
    columns = {
        name: _opened(values, name, path.parent) or values for name, values in columns.items()
    }
    return columns, tuple(f"{path.name}: {note}" for note in (*notes, *noted, *more))


def _kind(path: Path) -> tuple[str, ...]:
    """Return the suffix of a plain file's kind, and a note if its name says another.

    Raises:
        FileError: if it is of no known kind.
    """
    suffix = file_suffix(path)
    with path.open("rb") as file:
        start = file.read(10_000)
    if not start:
        raise FileError("is empty", "use a file with data")
    first = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:100].lower()
    if first.startswith(b"version https://git-lfs"):
        raise FileError("is a pointer of Git LFS, not the file itself", "run `git lfs pull`")
    if first.startswith((b"<!doctype", b"<html")):
        raise FileError("is a web page, not data", "download the file itself (the raw one)")
    if start.startswith(b"PAR1") and suffix != ".parquet":
        return ".parquet", "it is a Parquet file, in spite of its name"
    if suffix == ".parquet" and not start.startswith(b"PAR1"):
        raise FileError("is not a Parquet file", "give it the suffix of what it is, such as .csv")
    if suffix in {".csv", ".tsv", ".tab"}:
        lines = start.splitlines() or [b""]
        if first.startswith((b"{", b"[")) and _is_json(lines[0].decode("utf-8", "replace")):
            return ".jsonl", "it is a JSON file, in spite of its name"
    if suffix == ".txt" and _has_tags(start):
        return ".conll", "it is read as a word and its tags a line"
    if suffix == ".tar":
        raise FileError("is an archive", "unpack it, and name a file or the folder")
    if suffix not in _READERS:
        raise FileError(
            f"is of an unknown kind ({path.suffix or 'no suffix'})",
            f"save it as one of {', '.join(_READERS)}",
        )
    return (suffix,)


def _has_tags(start: bytes) -> bool:
    """Return whether each line of a text is a word with tags, the last one of an entity."""
    whole = start[: start.rfind(b"\n") + 1].splitlines()
    lines = [line.split() for line in whole if line.strip()]
    lines = [fields for fields in lines if fields[0] != b"-DOCSTART-"]
    return len(set(map(len, lines))) == 1 and all(
        len(fields) > 1 and re.fullmatch(rb"O|[BIESLU]-\S+", fields[-1]) for fields in lines
    )


def _linked(path: Path, scratch: Path) -> Path:
    """Return the file under a name that datasets does not take for a pattern."""
    if not glob.has_magic(str(path)):
        return path
    target = scratch / f"rows{file_suffix(path)}"
    shutil.copyfile(path, target)
    return target


@contextmanager
def _as_file_errors(problem: str, remedy: str) -> Iterator[None]:
    """Turn the errors of a library's reader, which may be of any type, into a FileError."""
    try:
        yield
    except FileError:
        raise
    except Exception as error:
        raise FileError(f"{problem} ({reason(error)})", remedy) from error


def reason(error: BaseException) -> str:
    """Return what went wrong in one short line; datasets gives it as the cause."""
    text = " ".join(str(error).split())
    if error.__cause__ is not None and text.startswith("An error occurred while generating"):
        text = " ".join(str(error.__cause__).split())
    return text[:300] or type(error).__name__


# Kinds of files


def _read_csv(path: Path, scratch: Path, max_bytes: int) -> tuple[Columns, list[str]]:
    import csv

    import datasets

    text, encoding, notes = decoded(path)
    expected = "\t" if path.suffix.lower() in {".tsv", ".tab"} else ","
    if not text.strip():
        raise FileError("is empty", "use a file with data")
    layout = csv_layout(text, expected)
    notes += layout.notes(expected)
    if not layout.n_rows:
        return {name: [] for name in layout.names}, notes
    with quiet_datasets(), _as_file_errors("cannot be read as CSV", "save it as JSONL or Parquet"):
        rows = datasets.Dataset.from_csv(
            str(path),
            # Everything is text. "NA", "None" and "null" are words and may be labels.
            features=datasets.Features({name: datasets.Value("string") for name in layout.names}),
            keep_default_na=False,
            na_filter=False,
            names=list(layout.names),
            header=0,
            sep=layout.separator,
            encoding=encoding,
            quoting=csv.QUOTE_MINIMAL if layout.has_quotes else csv.QUOTE_NONE,
            doublequote=layout.escape is None,
            escapechar=layout.escape,
            skipinitialspace=layout.skips_spaces,
            index_col=False,
            keep_in_memory=True,
            cache_dir=str(scratch / "datasets"),
        )
    if rows.num_rows != layout.n_rows:
        raise FileError(
            f"has {layout.n_rows} rows, but the CSV reader of datasets finds {rows.num_rows}",
            "save it as JSONL or Parquet, where rows are unmistakable",
        )
    return {name: rows[name][:] for name in layout.names}, notes


def _read_json(path: Path, scratch: Path, max_bytes: int) -> tuple[Columns, list[str]]:
    """Read a list of rows, an object that holds one, columns, or one row a line.

    Python's own reader keeps values as they are written. That of datasets takes texts for dates,
    the text "1" for a number if another row has one, and the last of two fields with one name; and
    it does not name the line of a mistake.
    """
    text, _, notes = decoded(path)
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise FileError("is empty", "use a file with data")
    if len(lines) > 1 and _is_json(lines[0][1]):
        parsed = [(f"line {number}", _parsed(line, number)) for number, line in lines]
        _check_characters(text, parsed)
        return row_columns(parsed), notes
    whole = _parsed(text, 1)
    if isinstance(whole, dict):
        lists = {name: value for name, value in whole.items() if isinstance(value, list)}
        rows = {n: v for n, v in lists.items() if v and all(isinstance(r, dict) for r in v)}
        if len(rows) == 1:
            name, whole = next(iter(rows.items()))
            notes.append(f"its rows are under {name!r}")
        elif len(lines) == 1 and not (len(lists) == len(whole) and lists):
            whole = [whole]
        elif lists and len(lists) == len(whole) and len(set(map(len, lists.values()))) == 1:
            notes.append("it is an object of columns")
            return lists, notes
    if not isinstance(whole, list):
        raise FileError(
            "does not hold a list of rows",
            'write one row a line, such as {"text": "...", "label": "..."}',
        )
    parsed = [(f"row {number}", row) for number, row in enumerate(whole, start=1)]
    _check_characters(text, parsed)
    return row_columns(parsed), notes


def _check_characters(text: str, rows: Sequence[tuple[str, Any]]) -> None:
    """Raise a FileError if a row has half of a surrogate pair, which no tokenizer takes."""
    if re.search(r"\\u[dD][89a-fA-F]", text) is None:
        return
    for where, row in rows:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise FileError(
                f"{where} holds half a character (a lone surrogate)",
                "leave the row out, or cut texts by characters, not by bytes",
            ) from None


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str, first_line: int) -> Any:
    try:
        found = json.loads(text, object_pairs_hook=_object, parse_int=whole_number)
        check_depth(found)
        return found
    except Unreadable as error:
        raise FileError(f"line {first_line}: it {error}", "correct or leave out that row") from None
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise FileError(
            f"line {line} is not JSON ({error.msg} at character {error.colno})",
            "mend that line, for example by writing each row with json.dumps; if the file was cut "
            "off there, copy it again",
        ) from error
    except RecursionError as error:
        raise FileError("holds lists in lists without end", "give flat rows") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        check_names([name for name, _ in pairs])
    return found


def row_columns(rows: Sequence[tuple[str, Any]]) -> Columns:
    """Return the columns of rows; a field that a row lacks is None.

    Args:
        rows: What an error calls the row, and the row.

    Raises:
        FileError: if a row is not a mapping.
    """
    names: dict[str, None] = {}
    for where, row in rows:
        if not isinstance(row, dict):
            raise FileError(
                f"{where} is not an object with named fields",
                'write rows such as {"text": "...", "label": "..."}',
            )
        names.update(dict.fromkeys(row))
        if len(names) > MAX_COLUMNS:
            raise FileError(
                f"has more than {MAX_COLUMNS:,} different fields in its rows",
                "use the same names in each row, and put what differs into values",
            )
    return {str(name): [row.get(name) for _, row in rows] for name in names}


def _read_parquet(path: Path, scratch: Path, max_bytes: int) -> tuple[Columns, list[str]]:
    import datasets
    import pyarrow.parquet as parquet

    with _as_file_errors("cannot be read as Parquet", COPY_AGAIN), quiet_datasets():
        about = parquet.read_metadata(path)
        check_names(list(about.schema.to_arrow_schema().names))
        # A page of one repeated value says a billion rows in a few bytes.
        groups = [about.row_group(index) for index in range(about.num_row_groups)]
        n_bytes = max(about.num_rows, sum(group.total_byte_size for group in groups))
        check_bytes(n_bytes, max_bytes)
        if not about.num_rows or not about.num_columns:  # datasets reads no batch of no rows.
            return {name: [] for name in about.schema.to_arrow_schema().names}, []
        rows = datasets.Dataset.from_parquet(
            str(path), keep_in_memory=True, cache_dir=str(scratch / "datasets")
        )
    return dataset_columns(rows), []


def _read_arrow(path: Path, scratch: Path, max_bytes: int) -> tuple[Columns, list[str]]:
    import datasets

    with _as_file_errors("cannot be read as Arrow", COPY_AGAIN):
        check_arrow(path)
        rows = datasets.Dataset.from_file(str(path), in_memory=True)
    return dataset_columns(rows), []


def check_arrow(path: Path) -> None:
    """Check the buffers of an Arrow stream, which reading trusts: false offsets end the process.

    Args:
        path: The file, as datasets writes it. All of it is read.

    Raises:
        pyarrow.ArrowInvalid: if it is damaged.
    """
    import pyarrow as pa

    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as batches:
        for batch in batches:
            batch.validate(full=True)


def _read_text(path: Path, scratch: Path, max_bytes: int) -> tuple[Columns, list[str]]:
    text, _, notes = decoded(path)
    notes.append("it is read as one text a line")
    return {"text": [line for line in text.splitlines() if line.strip()]}, notes


_CONLL_NAMES: Mapping[int, tuple[str, ...]] = {
    1: ("tokens",),
    2: ("tokens", "ner_tags"),
    3: ("tokens", "pos_tags", "ner_tags"),
    4: ("tokens", "pos_tags", "chunk_tags", "ner_tags"),
}
"""Number of columns -> their names, as datasets has them."""


def _read_conll(path: Path, scratch: Path, max_bytes: int) -> tuple[Columns, list[str]]:
    """Read one token a line, with empty lines between sentences.

    The reader of datasets (since 5) fills up and cuts lines of another length without a word.
    """
    text, _, notes = decoded(path)
    sentences: list[list[list[str]]] = []
    width = 0
    is_open = False
    for number, line in enumerate(text.split("\n"), start=1):
        fields = line.strip().split("\t") if "\t" in line else line.split()
        if not fields or fields[0] == "-DOCSTART-":
            is_open = False
            continue
        width = width or len(fields)
        if len(fields) != width or width not in _CONLL_NAMES:
            expected = width if width in _CONLL_NAMES else "1 to 4"
            raise FileError(
                f"line {number} has {len(fields)} fields where {expected} are expected",
                "write a token and its tag on each line, and an empty line after each sentence",
            )
        if not is_open:
            sentences.append([])
            is_open = True
        sentences[-1].append(fields)
    names = _CONLL_NAMES.get(width, ())
    return {
        name: [[fields[place] for fields in sentence] for sentence in sentences]
        for place, name in enumerate(names)
    }, notes


_READERS: Mapping[str, Callable[[Path, Path, int], tuple[Columns, list[str]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".tab": _read_csv,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
    ".conll": _read_conll,
    ".bio": _read_conll,
    ".iob": _read_conll,
    ".iob2": _read_conll,
}


# Columns of datasets


def dataset_columns(rows: Any) -> Columns:
    """Return the columns of a `datasets.Dataset` as Python values.

    Classes become their names, and unknown ones (-1, as in hidden test sets) None. Images are
    opened, but not yet decoded; a sound is a mapping of "bytes" and "path".
    """
    # Text that is no UTF-8 is found only when it becomes Python's.
    with _as_file_errors("holds a value that cannot be read", COPY_AGAIN):
        rows = rows.with_format(None)
        return {str(n): _values(rows, n, feature) for n, feature in rows.features.items()}


def _values(rows: Any, name: str, feature: Any) -> Sequence[Any]:
    import datasets

    is_media = isinstance(feature, datasets.Image | datasets.Audio)
    if is_media or (isinstance(feature, dict) and set(feature) == {"bytes", "path"}):
        if is_media:
            rows = rows.select_columns(name).cast_column(name, type(feature)(decode=False))
        cells = rows[name][:]
        if isinstance(feature, datasets.Audio) or any(map(_is_sound, cells)):
            return [cell if cell and (cell["bytes"] or cell["path"]) else None for cell in cells]
        return [_image(cell, name, row) for row, cell in enumerate(cells)]
    if isinstance(feature, datasets.Value):
        values: Sequence[Any] = rows[name][:]
        return values
    return [_named(value, feature, name, row) for row, value in enumerate(rows[name][:], start=1)]


def _named(value: Any, feature: Any, name: str, row: int) -> Any:
    """Return a value with classes as names; raise a FileError if a class has none."""
    import datasets

    if value is None or isinstance(feature, datasets.Value):
        return value
    if isinstance(feature, datasets.ClassLabel):
        if not -1 <= value < len(feature.names):
            raise FileError(
                f"row {row} of the column {name!r} is class {value}, but the names are those of 0 "
                f"to {len(feature.names) - 1}",
                "correct that row, or give the column the names of all classes",
            )
        return feature.names[value] if value >= 0 else None
    inner = getattr(feature, "feature", None)  # of lists
    if inner is not None and isinstance(value, list):
        return [_named(item, inner, name, row) for item in value]
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: _named(item, feature.get(key), name, row) for key, item in value.items()}
    return value


def _is_sound(cell: Any) -> bool:
    """Return whether a file's bytes begin as those of a sound do."""
    start = ((cell or {}).get("bytes") or b"")[:12]
    is_wave = start[:4] in (b"RIFF", b"RF64") and start[8:] == b"WAVE"
    is_mp3 = start[:1] == b"\xff" and len(start) > 1 and start[1] >= 0xE0
    return is_wave or is_mp3 or start.startswith((b"fLaC", b"OggS", b"ID3", b"FORM"))


def sound_feature() -> Any:
    """Return the feature of sounds in a folder, whose files need not be decoded to be listed."""
    import datasets

    class SoundFile(datasets.Audio):  # type: ignore[misc]
        def encode_example(self, value: Any) -> Any:
            # That of datasets imports torchcodec even where it copies a path.
            return {"bytes": None, "path": value}

    return SoundFile


def _image(cell: Any, name: str, row: int) -> Any:
    from io import BytesIO

    import PIL.Image

    if cell is None:
        return None
    try:
        raw = cell["bytes"] if cell.get("bytes") is not None else Path(cell["path"]).read_bytes()
        opened = PIL.Image.open(BytesIO(raw))
    except (OSError, ValueError, SyntaxError, TypeError, PIL.Image.DecompressionBombError) as error:
        raise FileError(*unreadable_image(row + 1, cell.get("path"), name)) from error
    opened.info[FILE] = cell.get("path")
    return opened


_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_SOUNDS = (".wav", ".flac", ".ogg", ".mp3")


def _opened(values: Sequence[Any], name: str, folder: Path) -> Sequence[Any] | None:
    """Return the images or sounds that a column names, relative to the folder of its file.

    None unless all its cells are names of such files that are there.
    """
    names = [value for value in values if value is not None and value != ""]
    for suffixes in (_IMAGES, _SOUNDS):
        if names and all(
            isinstance(value, str)
            and value.lower().endswith(suffixes)
            and os.path.isfile(folder / value)  # False for a name that is too long, too
            for value in names
        ):
            cells = [
                {"bytes": None, "path": str(folder / value)} if value else None for value in values
            ]
            if suffixes is _SOUNDS:
                return cells
            return [_image(cell, name, row) for row, cell in enumerate(cells)]
    return None


FILE = "autopeft_file"
"""Key of an image's `info` for the file that it came from."""


def unreadable_image(row: int, path: str | None, column: str, reason: str = "") -> tuple[str, str]:
    """Return the problem and the remedy of a cell that is no image, or a damaged one."""
    file = f" ({Path(path).name})" if path else ""
    problem = f"row {row}{file} of the column {column!r} is not a readable image"
    return problem + (f" ({reason})" if reason else ""), "remove or replace it"
