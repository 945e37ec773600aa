"""The bytes of a file: compression and encoding."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from autopeft.tasks.csv_layout import FileError
from autopeft.utils.formatting import human_bytes

COMPRESSED: Mapping[str, tuple[bytes, str]] = {
    ".gz": (b"\x1f\x8b", "gzip"),
    ".bz2": (b"BZh", "bzip2"),
    ".xz": (b"\xfd7zXZ\x00", "xz"),
    ".zip": (b"PK\x03\x04", "zip"),
}
"""Suffix -> first bytes and name of a compression."""

COPY_AGAIN = "copy or download it again: it may be cut off"


def file_suffix(path: Path) -> str:
    """Return the suffix that tells the kind of a file, without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


MAX_BYTES = 8 * 2**30
"""Largest data file that is read, after decompression, where the settings name no other."""

_RATIO, _HARMLESS = 250, 64 * 2**20
"""How many times its size a file may hold, beyond so many bytes. Texts hold 3 to 30 times their
size, a bomb a thousand times."""


def check_size(path: Path, max_bytes: int) -> None:
    """Raise a FileError if a file is larger than `max_bytes`."""
    check_bytes(path.stat().st_size, max_bytes)


def check_bytes(n_bytes: int, max_bytes: int) -> None:
    """Raise a FileError if so many bytes are more than `max_bytes`."""
    if n_bytes > max_bytes:
        raise FileError(
            f"is larger than {human_bytes(max_bytes)}, the most that is read",
            "give fewer rows, or a larger max_data_gb",
        )


def _copy(source: IO[bytes], target: IO[bytes], n_compressed: int, max_bytes: int) -> None:
    """Write what is decompressed, up to the limits; raise a FileError beyond them."""
    total = 0
    while block := source.read(1 << 20):
        total += len(block)
        check_bytes(total, max_bytes)
        if total > max(_HARMLESS, _RATIO * n_compressed):
            raise FileError(
                f"holds more than {_RATIO} times its own size, as no data does",
                "decompress it yourself and name the plain file, if you trust it",
            )
        target.write(block)


def decompressed(
    path: Path, scratch: Path, suffixes: Sequence[str], max_bytes: int = MAX_BYTES
) -> tuple[Path, list[str]]:
    """Return the plain file; the first bytes say how it is compressed, not the name.

    Raises:
        FileError: if it is damaged or cut off, larger than `max_bytes` when decompressed, or so
            much larger than its own size that it is no data.
    """
    with path.open("rb") as file:
        start = file.read(8)
    found = next((n for s, (magic, n) in COMPRESSED.items() if start.startswith(magic)), None)
    named = COMPRESSED.get(path.suffix.lower(), (b"", None))[1]
    name = path.stem if named else path.name
    if found == "zip" and named is None and file_suffix(path) not in suffixes:
        found = None  # spreadsheets are zip files too
    if found is None:
        if named is None:
            return path, []
        target = scratch / name
        shutil.copyfile(path, target)
        return target, [f"it is not compressed with {named}, in spite of its name"]
    target = scratch / name
    notes = [] if found == named else [f"it is compressed with {found}, in spite of its name"]
    try:
        if found == "zip":
            return _unzipped(path, scratch, suffixes, max_bytes), notes
        opened: IO[bytes] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}[found](path)  # type: ignore[operator]
        with opened as source, target.open("wb") as plain:
            _copy(source, plain, path.stat().st_size, max_bytes)
    except (EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise FileError(f"is a damaged {found} file ({reason})", COPY_AGAIN) from error
    except (RuntimeError, NotImplementedError) as error:  # a password, an unknown method
        raise FileError(f"cannot be unzipped ({error})", "unzip it and name the file") from error
    return target, notes


def _unzipped(path: Path, scratch: Path, suffixes: Sequence[str], max_bytes: int) -> Path:
    with zipfile.ZipFile(path) as archive:
        members = [
            member
            for member in archive.infolist()
            if not member.is_dir()
            and not member.filename.startswith("__MACOSX/")
            and file_suffix(Path(member.filename)) in suffixes
        ]
        if len(members) != 1:
            raise FileError(
                f"holds {len(members)} data files where one is expected",
                "unzip it and name a file, a pattern such as 'folder/*.csv', or the folder",
            )
        target = scratch / Path(members[0].filename).name
        with archive.open(members[0]) as source, target.open("wb") as plain:
            _copy(source, plain, path.stat().st_size, max_bytes)
    return target


def _encoding(raw: bytes) -> str:
    """Return a file's encoding: by its byte order mark, else the first that fits."""
    marks = (
        (b"\xff\xfe\x00\x00", "utf-32"),
        (b"\x00\x00\xfe\xff", "utf-32"),
        (b"\xef\xbb\xbf", "utf-8-sig"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    )
    for mark, name in marks:
        if raw.startswith(mark):
            return name
    start = raw[:2000]
    if b"\x00" in start:
        # UTF-16 without its mark: in most texts every other byte is zero.
        even, odd = start[0::2].count(0), start[1::2].count(0)
        if max(even, odd) > 0.4 * len(start) / 2:
            return "utf-16-be" if even > odd else "utf-16-le"
        raise FileError("is a binary file, not text", "save it as text, in UTF-8")
    for name in ("utf-8", "cp1252"):
        try:
            raw.decode(name)
        except UnicodeDecodeError:
            continue
        return name
    return "latin-1"


def decoded(path: Path) -> tuple[str, str, list[str]]:
    """Return a file's text, its encoding, and a note if it is not UTF-8."""
    raw = path.read_bytes()
    encoding = _encoding(raw)
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise FileError(
            f"is not valid {encoding.upper()} (at byte {error.start})", "save it as UTF-8"
        ) from error
    if encoding.startswith("utf-8"):
        return text, encoding, []
    advice = "" if encoding.startswith("utf") else "; if letters look wrong, save it as UTF-8"
    return text, encoding, [f"it is not UTF-8 but read as {encoding}{advice}"]
