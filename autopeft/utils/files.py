"""Write files and folders atomically, so that an interrupted run leaves nothing half-written."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from autopeft.errors import StorageError
from autopeft.utils.abandoned import held, remove, remove_abandoned
from autopeft.utils.formatting import one_line

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DRAFT = ".draft"
_LOCK = f".lock{_DRAFT}"
"""End of the name of a draft's lock: what a killed process has left of both is a draft."""

# Folders that this process holds, with their device and inode.
_HELD: dict[Path, tuple[int, int] | None] = {}


def is_full(error: OSError) -> bool:
    """Return whether an error says that a disk, or the user's share of it, has no more room."""
    return _first(error).errno in _FULL


def _first(error: OSError) -> OSError:
    """Return the first error of those that a copy of a folder met; `shutil` keeps their texts."""
    if not (isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list)):
        return error
    met = [str(each[-1]) for each in error.args[0] if isinstance(each, tuple) and each]
    found = next(filter(None, (re.match(r"\[Errno (\d+)\]", text) for text in met)), None)
    if found is None:
        return OSError(met[0] if met else one_line(error))
    number = int(found[1])
    return OSError(number, os.strerror(number))


def not_written(field: str, path: Path, error: OSError) -> StorageError:
    """Return the error, in one line, of a file that cannot be written."""
    error = _first(error)
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
    _make_parent(path)
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


def hold(folder: Path) -> None:
    """Write into this folder only as long as it is the one that it is now.

    A folder that is removed or moved while a search runs would be made again, without its study.
    """
    _HELD.update({place: _identity(folder) for place in (folder.absolute(), folder.resolve())})


def let_go(folder: Path) -> None:
    """Take back what `hold` said."""
    for place in (folder.absolute(), folder.resolve()):
        _HELD.pop(place, None)


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _make_parent(path: Path) -> None:
    """Make the folder of a file, but no folder again that is held."""
    for place in path.absolute().parents:
        if place in _HELD and _identity(place) != _HELD[place]:
            raise StorageError(
                "output",
                str(place),
                "was removed or moved in the meantime; nothing is written there",
                "`autopeft resume` of the folder where it is now goes on",
            )
    path.parent.mkdir(parents=True, exist_ok=True)


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

    If the block raises, `target` is left unchanged. What a killed process has begun to write for it
    is removed by the next; what another one is writing is not.

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
    _make_parent(target)
    start = f".{target.name}."
    for left in target.parent.glob(f"{escape(start)}*{_LOCK}"):
        remove_abandoned(_draft_of(left), left)
    lock = held(target.parent / f"{start}{uuid.uuid4().hex[:8]}{_LOCK}")
    draft = _draft_of(Path(lock.lock_file))
    try:
        draft.mkdir(mode=0o700)
        yield draft
        for path in draft.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        draft.chmod(0o755)  # It was private to the user.
        if target.exists():
            shutil.rmtree(target)
        os.replace(draft, target)
    finally:
        remove(draft, lock)


def _draft_of(lock: Path) -> Path:
    """Return the folder whose lock this is."""
    return lock.with_name(lock.name.removesuffix(_LOCK) + _DRAFT)
