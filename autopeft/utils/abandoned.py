"""Folders whose process was killed, told by a lock beside each.

The lock of a process ends with it, whatever kills it. Process numbers would not tell, because each
container has its own.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout


def held(path: Path) -> FileLock:
    """Make and hold the lock of a folder; lock first, so that none is ever without.

    Without file locks on a file system, nothing is ever cleaned up.

    Args:
        path: File of the lock, of a new name: only a process that cleans up may hold it, briefly.
    """
    lock = FileLock(path)
    with suppress(NotImplementedError, Timeout):
        lock.acquire(timeout=1.0)
    return lock


def remove_abandoned(folder: Path, path: Path) -> None:
    """Remove a folder whose lock no process holds, and the lock.

    Args:
        folder: The folder, which may be gone.
        path: File of its lock.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError, NotImplementedError):
        return  # Alive, or another user's.
    remove(folder, lock)


def remove(folder: Path, lock: FileLock) -> None:
    """Remove a folder and its lock, which this process holds."""
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():  # Else another process has just written to it.
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
