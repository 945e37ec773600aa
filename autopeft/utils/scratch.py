"""Temporary folders that are removed even if their process is killed.

An activation cache may hold gigabytes. Python removes a temporary folder when its process ends, but
not when the system kills it for lack of memory; so the next search removes such folders.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from autopeft.utils.abandoned import held, remove, remove_abandoned
from autopeft.utils.files import not_written

_PREFIX = "autopeft-"
_LOCK = ".lock"

# Of the copies that this process made.
_COPIES: dict[Path, FileLock] = {}


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a temporary folder and remove it on exit, with those that dead processes left behind."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*{_LOCK}"):
        remove_abandoned(left.with_suffix(""), left)
    folder = Path(tempfile.mktemp(prefix=_PREFIX))
    lock = held(Path(f"{folder}{_LOCK}"))
    try:
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise not_written("TMPDIR", folder.parent, error) from error
        yield folder
    finally:
        remove(folder, lock)


def ensure_copy(folder: Path) -> None:
    """Make a scratch folder where it is missing, with a lock that this process holds.

    It is missing on a machine that did not make it, and where it was removed because its maker
    died; workers may live on for seconds. Without a lock, what they write would stay for good.
    """
    if folder.is_dir():
        return
    lock = FileLock(f"{folder}{_LOCK}")
    with suppress(Timeout, NotImplementedError):  # Another worker of this machine made it.
        lock.acquire(timeout=0)
        _COPIES[folder] = lock
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def remove_copy(folder: str | None) -> None:
    """Remove what a worker on another machine has written under a scratch folder's name.

    Where the process that made the folder lives, it stays.
    """
    if folder is None:
        return
    if (lock := _COPIES.pop(Path(folder), None)) is not None:
        lock.release()
    if Path(folder).exists():
        remove_abandoned(Path(folder), Path(folder + _LOCK))
