"""A folder behind a URL that one process uses at a time, on whatever machine.

Object stores have no locks. The process that uses the folder keeps a file there, with its
heartbeat, and others watch whether the file changes: clocks of machines differ.
"""

from __future__ import annotations

import json
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Lock

from autopeft.errors import StorageError, UserError
from autopeft.utils.folder_lock import Holder, lives
from autopeft.utils.remote_files import RemoteFiles, draft_of
from autopeft.utils.serialize import from_plain, strict_json

_OWNER = ".owner.json"

BEAT_SECONDS = 10.0
"""From one heartbeat to the next: each is a request."""

WATCH_SECONDS = 30.0
"""A process whose file does not change for so long is dead."""

STALE_SECONDS = 300.0
"""A process whose heartbeat is older than this is dead without watching it."""

SETTLE_SECONDS = 1.0
"""From writing the file to reading it again: who saw none before has written its own by then."""

_TRIES = 5


@dataclass(frozen=True)
class _Claim:
    """A process that uses the folder, and what tells its sessions apart."""

    holder: Holder
    session: str


class RemoteLock:
    """One session's claim on a folder behind a URL, kept alive by `beat`.

    Args:
        files: The folder; `beat` uses it in a thread of its own.
        holder: This process.

    Example:
        >>> from autopeft.utils.folder_lock import Holder
        >>> from autopeft.utils.remote_files import RemoteFiles
        >>> from autopeft.utils.remote_lock import RemoteLock
        >>> lock = RemoteLock(RemoteFiles("memory://runs/own"), Holder.here())
        >>> lock.claim()
        >>> lock.release()
    """

    def __init__(self, files: RemoteFiles, holder: Holder) -> None:
        self._files = files
        self._claim = _Claim(holder, uuid.uuid4().hex)
        self._taken_by: _Claim | None = None
        self._is_over = False
        self._writing = Lock()  # A late heartbeat writes nothing after the end.

    def claim(self, former: Holder | None = None) -> None:
        """Take the folder.

        Args:
            former: A process that is known to have ended.

        Raises:
            StorageError: if another process has it, or it cannot be written.
        """
        with self._files.named("read"):
            last = self._read()
        if last is not None and not (former is not None and last.holder.is_same(former)):

            def again() -> Holder | None:
                with self._files.named("read"):
                    claim = self._read()
                return claim.holder if claim is not None else None

            if lives(last.holder, again, watch=WATCH_SECONDS, stale=STALE_SECONDS):
                raise self._in_use(last)
        try:
            self._take()
        except BaseException:
            self.release()
            raise

    def _take(self) -> None:
        """Write the file; of two that do so at once, the first is overwritten and gives way."""
        for _ in range(_TRIES):
            with self._files.named("written"):
                self._write(time.time())
                time.sleep(SETTLE_SECONDS)
                now = self._read()
            if now is not None and now.session != self._claim.session:
                raise self._in_use(now)
            if now is not None:
                return
            # One that ended just now has removed it.
        with self._files.named("written"):
            raise OSError("what is written there is not found")

    def beat(self) -> None:
        """Note that this process is alive, unless another one has taken the folder over."""
        with self._writing:
            if self._is_over:
                return
            now = self._read()
            if now is not None and now.session != self._claim.session:
                self._taken_by = now
            else:
                self._taken_by = None
                self._write(time.time())

    def check(self) -> None:
        """Check that no other process has taken the folder over.

        Raises:
            StorageError: if one has, as when this one was stopped for a while.
        """
        if self._taken_by is not None:
            raise self._in_use(self._taken_by)

    def release(self) -> None:
        """Let others use the folder; the file of another process stays."""
        with self._writing, suppress(Exception):  # Others watch it then, until it is dead to them.
            self._is_over = True
            now = self._read()
            if now is not None and now.session == self._claim.session:
                self._end()
        with suppress(Exception):
            self._files.remove_made()

    def _end(self) -> None:
        try:
            self._files.remove(_OWNER)
        except Exception:  # Some may write and not remove.
            self._write(0.0)

    def _read(self) -> _Claim | None:
        for _ in range(_TRIES):
            content = self._files.read(_OWNER)
            if content is None:
                return None
            with suppress(ValueError, UserError):
                return from_plain(_Claim, json.loads(content), allow_unknown=True)
            time.sleep(0.1)  # It is being written.
        return None

    def _write(self, heartbeat: float) -> None:
        holder = replace(self._claim.holder, heartbeat=heartbeat)
        self._claim = replace(self._claim, holder=holder)
        self._files.write(_OWNER, strict_json(self._claim, indent=None).encode())

    def _in_use(self, claim: _Claim) -> StorageError:
        return StorageError(
            "output",
            self._files.url,
            f"is in use by {claim.holder.text}",
            "wait for it or stop it, or choose another folder",
        )


def is_of_remote_lock(name: str) -> bool:
    """Return whether a file behind a URL was made by a lock."""
    return name in (_OWNER, draft_of(_OWNER))
