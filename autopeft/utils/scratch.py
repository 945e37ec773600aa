"""Temporary folders that are removed even if their process is killed.

An activation cache may hold gigabytes. Python removes a temporary folder when its process ends, but
not when the system kills it for lack of memory; so the next search removes such folders.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from autopeft.utils.files import not_written

_PREFIX = "autopeft-"
_LOCK = ".lock"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a temporary folder and remove it on exit, with those that dead processes left behind.

    A lock beside each folder says that its process is alive; process numbers would not, because
    each container has its own.
    """
    _remove_abandoned()
    # Lock first, so that another process never sees the folder without its lock.
    name = tempfile.mktemp(prefix=_PREFIX)
    lock = FileLock(name + _LOCK)
    with suppress(NotImplementedError):  # Without file locks, nothing is ever cleaned up.
        lock.acquire()
    folder = Path(name)
    try:
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise not_written("TMPDIR", folder.parent, error) from error
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def remove_copy(folder: str | None) -> None:
    """Remove what a worker on another machine has written under a scratch folder's name.

    Where the lock beside it is, the folder is that of the process that made it, and stays.
    """
    if folder is not None and not Path(folder + _LOCK).exists():
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*{_LOCK}"):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError, NotImplementedError):
            continue  # Alive, or another user's.
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        path.unlink(missing_ok=True)
        lock.release()
