"""Write files and folders atomically, so that an interrupted run leaves nothing half-written."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autopeft.errors import StorageError
from autopeft.utils.formatting import one_line

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DRAFT = ".draft"


def is_full(error: OSError) -> bool:
    """Return whether an error says that a disk, or the user's share of it, has no more room."""
    return error.errno in _FULL


def not_written(field: str, path: Path, error: OSError) -> StorageError:
    """Return the error, in one line, of a file that cannot be written."""
    problem = f"cannot be written ({error.strerror or one_line(error)[:200]})"
    remedy = "make room there" if is_full(error) else "make it writable"
    return StorageError(
        field, str(path), problem, f"{remedy} and try again; `autopeft resume` continues a search"
    )


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically and sync it to disk; create its folder.

    Raises:
        StorageError: if the disk is full or the file cannot be written; it is left as it was.
    """
    try:
        _write_bytes(path, content)
    except OSError as error:
        raise not_written("file", path, error) from error


def _write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_DRAFT)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes it private to the user
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, content: str) -> None:
    """Replace a file atomically with UTF-8 text; lone surrogates become `?`."""
    write_bytes(path, content.encode("utf-8", errors="replace"))


def remove_drafts(folder: Path, of: str | None = None) -> None:
    """Remove what a killed process had begun to write in a folder that nobody else writes to.

    Args:
        folder: The folder.
        of: Name of a file in it whose drafts go; None for those of everything below the folder.
    """
    for path in list(folder.glob(f"**/.*{_DRAFT}" if of is None else f".{of}.*{_DRAFT}")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def contained(folder: Path, name: str | Path) -> Path:
    """Return the path of something in a folder; links may not lead out of the folder.

    A folder that was handed over may hold a link in place of `plots` or of an adapter, and what is
    written or read there would be elsewhere.

    Args:
        folder: The folder; it may itself be a link.
        name: Path inside it, which need not exist.

    Raises:
        StorageError: if it leads elsewhere.
    """
    path = folder / name
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a circle of links
        is_inside = False
    if not is_inside:
        raise StorageError(
            "folder", str(path), f"leads out of {folder}", "replace the link by what it links to"
        )
    return path


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to write to; when the block ends, sync it and replace `target` with it.

    If the block raises, `target` is left unchanged.

    Raises:
        StorageError: if the disk is full or the folder cannot be written.
    """
    try:
        with _replaced_folder(target) as draft:
            yield draft
    except OSError as error:
        raise not_written("folder", target, error) from error


@contextmanager
def _replaced_folder(target: Path) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=_DRAFT))
    try:
        yield draft
        for path in draft.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        draft.chmod(0o755)  # mkdtemp makes it private to the user
        if target.exists():
            shutil.rmtree(target)
        os.replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
