"""A folder in object storage or on another file system, worked on in a copy on this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

from autopeft.errors import StorageError
from autopeft.utils.folder_lock import FolderLock, is_in_use, is_of_lock
from autopeft.utils.remote_files import RemoteFiles, draft_of, is_inside
from autopeft.utils.remote_lock import BEAT_SECONDS, RemoteLock, is_of_remote_lock
from autopeft.utils.serialize import from_plain, strict_json
from autopeft.utils.timer import Timer

_COPIES = ".copies.json"
"""Name of the file that says what was copied there; one is beside the copy here, too."""

_ID = "state/id.json"
_DATABASE = ".db"
_BESIDE = (".db-journal", ".db-wal", ".db-shm")

PUSH_SECONDS = 30.0
"""From one copy to the next, while a search runs."""


@dataclass(frozen=True)
class _Copies:
    """What was copied to a URL.

    Attributes:
        count: How often; 0: the first copy has begun.
        search: The search's id.
        token: What tells this copy from all others.
        files: Everything that was put there, and nothing else: only that is ever removed.
    """

    count: int
    search: str = ""
    token: str = ""
    files: tuple[str, ...] = ()


class RemoteFolder:
    """A folder named by a URL of fsspec, with a copy in `~/.cache/autopeft/runs`.

    Args:
        url: Such as `s3://bucket/runs/first`, `gs://...`, `file:///mnt/...`.

    Raises:
        StorageError: if it names no folder, or its file system is unknown, not installed, or does
            not answer.

    Attributes:
        url: The URL, without a slash at its end.
        local: The copy on this machine.

    Example:
        >>> from autopeft.utils.remote_folder import RemoteFolder
        >>> folder = RemoteFolder("memory://runs/first")
        >>> folder.local.mkdir(parents=True, exist_ok=True)
        >>> (folder.local / "front.json").write_text("{}")
        2
        >>> folder.push("d1")
        >>> RemoteFolder("memory://runs/first").names()
        ('front.json',)
    """

    def __init__(self, url: str) -> None:
        self._files = RemoteFiles(url)
        self.url = self._files.url
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:8]
        self.local = Path.home() / ".cache" / "autopeft" / "runs" / f"{self._files.name}-{digest}"
        self._lock: RemoteLock | None = None
        self._pushing = Lock()  # The last copy may begin while that of the timer goes on.
        self._pushed: dict[str, tuple[int, int]] = {}
        self._has_written = False
        self._known: set[str] = set()  # Tokens of the copies that this process has seen or made.

    def names(self) -> tuple[str, ...]:
        """Return the paths of the files that are there, sorted, without those of the copying."""
        return tuple(name for name in self._files.names() if not _is_mark(name))

    @contextmanager
    def held(self, lock: FolderLock) -> Iterator[None]:
        """Hold the folder at the URL for this process, which holds the copy here by `lock`.

        Raises:
            StorageError: if another process has it, on whatever machine, or it cannot be written.
        """
        owner = RemoteLock(RemoteFiles(self.url, is_alone=True), lock.holder)
        owner.claim(lock.former)
        self._lock = owner
        try:
            with Timer(owner.beat, BEAT_SECONDS):
                yield
        finally:
            self._lock = None
            owner.release()

    # --- from there -------------------------------------------------------------------------------

    def pull(self, search: str | None) -> None:
        """Take what is there, unless the copy here is as new, or a process here works on it.

        Args:
            search: Id of the search whose copy is here, if there is one.

        Raises:
            StorageError: if it cannot be read, or holds another search.
        """
        with self._named("read"):
            there, here = self._there(), self._here()
            if there is None:
                return
            if search and there.search and there.search != search:
                raise StorageError(
                    "output",
                    self.url,
                    f"holds the search {there.search}, and its copy here, {self.local}, is of the "
                    f"search {search}",
                    "move that copy away, which keeps it, or choose another URL",
                )
            self._known.add(there.token)
            is_newer = there.count > here.count or (
                there.count == here.count and there.token != here.token
            )
            if there.count == 0 or not is_newer:
                return
            if self._lock is None and is_in_use(self.local):
                return
            self._clear()
            # A copy of an earlier version does not say which files are its own.
            own = set(there.files) if there.token else None
            for name in self.names():
                if own is None or name in own:
                    self._files.get(name, self.local / name)
            self._note(there)

    def is_empty(self) -> bool:
        """Return whether nothing is there, except for a lock.

        Raises:
            StorageError: if it cannot be read.
        """
        with self._named("read"):
            return all(
                is_of_remote_lock(name) or name == draft_of(_COPIES) for name in self._files.top()
            )

    def has_copy(self) -> bool:
        """Return whether a search was copied there, or begun to be.

        Raises:
            StorageError: if it cannot be read.
        """
        with self._named("read"):
            return self._there() is not None

    # --- to there ---------------------------------------------------------------------------------

    def push(self, search: str) -> None:
        """Copy what has changed since the last call; remove what was copied and is no longer here.

        Args:
            search: Id of the search.

        Raises:
            StorageError: if it cannot be written, or another search or process has it by now.
        """
        with self._pushing, self._named("written"):
            if self._lock is not None:
                self._lock.check()
            there = self._there()
            if there is None:
                self._pushed.clear()
                there = _Copies(0, search, self._token())
            self._check_own(there, search)
            here, own = self._found(), set(there.files)
            if not own.issuperset(here):
                # First, so that a kill leaves no file there that is nobody's.
                self._has_written = True
                self._write(replace(there, search=search, files=tuple(sorted(own.union(here)))))
            for name, seen in here.items():
                if self._pushed.get(name) != seen and self._put(name):
                    self._pushed[name] = seen
            for name in own.difference(here):
                self._files.remove(name)
                self._pushed.pop(name, None)
            count = max(there.count, self._here().count) + 1
            copies = _Copies(count, search, self._token(), tuple(sorted(here)))
            self._note(copies)  # Before the other, or a reader would take this copy for older.
            self._write(copies)  # Last: what is there is whole then.

    def withdraw(self) -> None:
        """Remove what this process has copied there, of a search that was not begun after all.

        Raises:
            StorageError: if it cannot be removed.
        """
        with self._pushing, self._named("removed"):
            there = self._there() if self._has_written else None
            if there is not None and there.token and there.token in self._known:
                for name in there.files:
                    self._files.remove(name)
                self._files.remove(_COPIES)
                self._files.remove_made()
            (self.local / _COPIES).unlink(missing_ok=True)

    def _check_own(self, there: _Copies, search: str) -> None:
        if there.token and there.token in self._known:
            return
        if there.search and there.search != search:
            problem = f"holds the search {there.search} by now, and this one is {search}"
        elif there.token:
            problem = f"another process has gone on with this search, {search}"
        else:  # A copy of an earlier version.
            return
        remedy = f"what this one has found is in {self.local}: move it away, which keeps it"
        raise StorageError("output", self.url, problem, remedy)

    def _found(self) -> dict[str, tuple[int, int]]:
        """Return name -> (bytes, time of change) of the files here that are copied."""
        found = {}
        for path in sorted(self.local.rglob("*")):
            is_passing = path.name.endswith(_BESIDE) or is_of_lock(path) or path.name == _COPIES
            if is_passing or not path.is_file():
                continue
            with suppress(FileNotFoundError):  # It was replaced just now.
                stat = path.stat()
                found[path.relative_to(self.local).as_posix()] = (stat.st_size, stat.st_mtime_ns)
        return found

    def _put(self, name: str) -> bool:
        """Copy one file; return whether it was still here."""
        path = self.local / name
        if path.suffix != _DATABASE:
            try:
                self._files.put(path, name)
            except FileNotFoundError:
                if path.exists():
                    raise
                return False  # The next copy has what replaced it.
            return True
        # A database that is written to is copied as of one moment.
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "study.db"
            with (
                closing(sqlite3.connect(path, timeout=60.0)) as source,
                closing(sqlite3.connect(whole)) as copy,
            ):
                source.backup(copy)
            self._files.put(whole, name)
        return True

    def _token(self) -> str:
        token = uuid.uuid4().hex
        self._known.add(token)
        return token

    # --- what was copied --------------------------------------------------------------------------

    def _there(self) -> _Copies | None:
        content = self._files.read(_COPIES)
        if content is None:
            return None
        copies = _read(content)
        if not copies.search:
            search = self._files.read(_ID)
            copies = replace(copies, search=str(json.loads(search)) if search else "")
        return copies

    def _here(self) -> _Copies:
        path = self.local / _COPIES
        return _read(path.read_bytes()) if path.exists() else _Copies(0)

    def _write(self, copies: _Copies) -> None:
        self._files.write(_COPIES, strict_json(copies, indent=None).encode())

    def _note(self, copies: _Copies) -> None:
        self.local.mkdir(parents=True, exist_ok=True)
        (self.local / _COPIES).write_text(strict_json(copies, indent=None))

    def _clear(self) -> None:
        """Remove the copy here, except for its lock."""
        (self.local / _COPIES).unlink(missing_ok=True)
        for path in list(self.local.iterdir()) if self.local.is_dir() else []:
            if is_of_lock(path):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    @contextmanager
    def _named(self, verb: str) -> Iterator[None]:
        remedy = f"; what there is is in {self.local}" if self.local.exists() else ""
        with self._files.named(verb, remedy=remedy):
            yield


def _is_mark(name: str) -> bool:
    return is_of_remote_lock(name) or name in (_COPIES, draft_of(_COPIES))


def _read(content: bytes) -> _Copies:
    plain = json.loads(content)
    if isinstance(plain, int):  # Earlier versions noted the count alone.
        return _Copies(plain)
    copies = from_plain(
        _Copies, plain, field=_COPIES, remedy="restore it", error=StorageError, allow_unknown=True
    )
    # It is a file of others: no name in it leads out of the folder.
    return replace(copies, files=tuple(filter(is_inside, copies.files)))
