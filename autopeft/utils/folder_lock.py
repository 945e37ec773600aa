"""A folder that one process uses at a time, and who that is.

A lock of the operating system says that its process is alive: it ends with the process, whatever
kills it. NFS, CephFS and GPFS keep such locks across machines; other network file systems keep them
on each machine alone, or have none. There, the heartbeat of the last process says it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from autopeft.errors import StorageError
from autopeft.utils.files import hold, let_go, write_text
from autopeft.utils.serialize import read_json, strict_json

_LOCK, _HOLDER = ".lock", ".holder.json"

BEAT_SECONDS = 5.0
"""From one heartbeat to the next."""

WATCH_SECONDS = 15.0
"""A process whose heartbeat does not change for so long is dead; clocks of machines may differ."""

STALE_SECONDS = 60.0
"""A process whose heartbeat is older than this is dead without watching it."""


@dataclass(frozen=True)
class Holder:
    """The process that uses a folder or a study.

    Attributes:
        host: Name of its machine.
        pid: Its number there.
        since: When it began, ISO 8601.
        heartbeat: When it was last heard of, seconds since 1970; 0: it has ended.
    """

    host: str
    pid: int
    since: str
    heartbeat: float

    @classmethod
    def here(cls) -> Holder:
        """Return this process, as of now."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(socket.gethostname(), os.getpid(), since, time.time())

    @property
    def is_stale(self) -> bool:
        """Whether it has ended, or has not been heard of for too long."""
        return self.is_silent(STALE_SECONDS)

    def is_silent(self, seconds: float) -> bool:
        """Whether it has ended, or has not been heard of for so long."""
        return time.time() - self.heartbeat > seconds

    def is_same(self, other: Holder) -> bool:
        """Whether two records are of one process."""
        return (self.host, self.pid, self.since) == (other.host, other.pid, other.since)

    @property
    def text(self) -> str:
        """Who it is, for a message."""
        return f"process {self.pid} on {self.host} since {self.since}"


class FolderLock:
    """Holds a folder for this process.

    Args:
        folder: The folder; it is made if it does not exist.
        shown: What the user knows it by, if that is not its path.

    Raises:
        StorageError: if another process, or another search of this one, holds the folder.

    Attributes:
        holder: This process.
        former: The process that held the folder last, if it was killed, on this machine.

    Example:
        >>> from autopeft.utils.folder_lock import FolderLock
        >>> lock = FolderLock(Path("runs/own"))
        >>> lock.release()
    """

    def __init__(self, folder: Path, *, shown: str = "") -> None:
        self._shown = shown or str(folder)
        self._folder = folder
        self._made = [p for p in (folder, *folder.parents) if not p.exists()]
        self.holder = Holder.here()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / _LOCK)
            has_lock = self._acquire()
            last = self._last()
            self.former = last if has_lock and last and last.host == self.holder.host else None
            if last is not None and self.former is None:
                # There are no locks here, or perhaps none across machines.
                if lives(last, self._last):
                    self._lock.release()
                    raise self._taken()
            hold(folder)
            self.beat()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise StorageError(
                "output", self._shown, f"cannot be written ({reason})", "choose another --output"
            ) from None

    def _acquire(self) -> bool:
        """Acquire the lock; return whether the file system has locks."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise self._taken() from None
        except NotImplementedError:
            return False
        return True

    def _last(self) -> Holder | None:
        path = self._folder / _HOLDER
        # It is removed by a process that ends, perhaps just now.
        with suppress(FileNotFoundError, StorageError):
            return read_json(path, Holder, remedy="delete it")
        return None

    def _taken(self) -> StorageError:
        # Whoever has just taken it writes the file at once.
        for _ in range(10):
            if (last := self._last()) is not None:
                break
            time.sleep(0.05)
        who = last.text if last is not None else "another process"
        return StorageError(
            "output",
            self._shown,
            f"is in use by {who}",
            "wait for it or stop it, or choose another folder",
        )

    def beat(self) -> None:
        """Note that this process is alive."""
        self.holder = replace(self.holder, heartbeat=time.time())
        write_text(self._folder / _HOLDER, strict_json(self.holder, indent=None))

    def release(self, *, is_unused: bool = False) -> None:
        """Let others use the folder.

        Args:
            is_unused: Whether to remove what the lock has made, the folder if it is empty included.
        """
        let_go(self._folder)
        with suppress(OSError):
            (self._folder / _HOLDER).unlink(missing_ok=True)
        if is_unused:
            with suppress(OSError):
                (self._folder / _LOCK).unlink(missing_ok=True)
                for path in self._made:
                    path.rmdir()
        self._lock.release()


def lives(
    last: Holder,
    read: Callable[[], Holder | None],
    *,
    watch: float | None = None,
    stale: float | None = None,
) -> bool:
    """Return whether a process is alive, by watching its heartbeat.

    Args:
        last: As it was read first.
        read: Reads it again.
        watch: A process whose heartbeat does not change for so many seconds is dead.
        stale: One whose heartbeat is older is dead without watching it.
    """
    watch, stale = watch or WATCH_SECONDS, stale or STALE_SECONDS
    if last.is_silent(stale):
        return False
    until = time.monotonic() + watch
    while time.monotonic() < until:
        time.sleep(min(0.5, watch / 10))
        now = read()
        if now is None or now.is_silent(stale):
            return False  # It has ended meanwhile.
        if now.heartbeat != last.heartbeat:
            return True
    return False


def is_in_use(folder: Path) -> bool:
    """Return whether a process of this machine holds a folder, without taking it."""
    if not (folder / _LOCK).exists():
        return False
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except (NotImplementedError, OSError):
        return False
    lock.release()
    return False


def is_of_lock(path: Path) -> bool:
    """Return whether a file was made by a lock, perhaps one whose process was killed."""
    return path.name in (_LOCK, _HOLDER) or path.name.startswith(f".{_HOLDER}.")
