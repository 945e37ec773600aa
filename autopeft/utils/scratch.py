"""Folders for a search's passing files; a search that was killed outright leaves none for good.

An activation cache may hold gigabytes. Python removes a temporary folder when its process
ends, not when the system kills it for lack of memory; so the next search looks for such folders.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_PREFIX = "autopeft-"
_LOCK = ".lock"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder where the system keeps temporary files, removed on exit.

    Those of processes that are no more are removed as well. Who is alive is told by a lock beside
    each folder, not by process numbers, which mean something else in each container.
    """
    _remove_abandoned()
    # The lock is held before the folder is there: nobody finds the one without the other.
    name = tempfile.mktemp(prefix=_PREFIX)
    lock = FileLock(name + _LOCK)
    with suppress(NotImplementedError):  # On a file system without locks nobody cleans up.
        lock.acquire()
    folder = Path(name)
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


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
