"""A folder in object storage or on another file system, worked on in a copy on this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path, PurePosixPath

from autopeft.errors import StorageError
from autopeft.utils.folder_lock import is_of_lock
from autopeft.utils.formatting import one_line

_COUNT = ".copies.json"
"""Name of the file that says how often the folder was copied there: the larger count is newer."""

_DATABASE = ".db"
_BESIDE = (".db-journal", ".db-wal", ".db-shm")

PUSH_SECONDS = 30.0
"""From one copy to the next, while a search runs."""


def is_url(folder: object) -> bool:
    """Return whether a folder is named by a URL.

    Example:
        >>> from autopeft.utils.remote_folder import is_url
        >>> is_url("s3://bucket/runs/first"), is_url("runs/first")
        (True, False)
    """
    return "://" in str(folder)


class RemoteFolder:
    """A folder named by a URL of fsspec, with a copy in `~/.cache/autopeft/runs`.

    Args:
        url: Such as `s3://bucket/runs/first`, `gs://...`, `file:///mnt/...`.

    Raises:
        StorageError: if its file system is unknown, not installed, or does not answer.

    Attributes:
        local: The copy on this machine.

    Example:
        >>> from autopeft.utils.remote_folder import RemoteFolder
        >>> folder = RemoteFolder("memory://runs/first")
        >>> folder.local.mkdir(parents=True, exist_ok=True)
        >>> (folder.local / "front.json").write_text("{}")
        2
        >>> folder.push()
        >>> RemoteFolder("memory://runs/first").names()
        ('front.json',)
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            import fsspec

            self._fs, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            problem = f"cannot be opened ({one_line(error)[:200]})"
            remedy = "install the package of its file system, such as s3fs, or use a folder"
            raise StorageError("output", url, problem, remedy) from None
        self._root = str(root).rstrip("/")
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:8]
        name = PurePosixPath(self._root).name or "run"
        self.local = Path.home() / ".cache" / "autopeft" / "runs" / f"{name}-{digest}"
        self._pushed: dict[str, tuple[int, int]] = {}

    def names(self) -> tuple[str, ...]:
        """Return the paths of the files that are there, sorted."""
        self._fs.invalidate_cache()
        found = self._fs.find(self._root) if self._fs.exists(self._root) else []
        names = (str(PurePosixPath(path).relative_to(self._root)) for path in found)
        return tuple(sorted(name for name in names if name != _COUNT))

    def pull(self) -> None:
        """Take what is there, unless the copy here is as new.

        Raises:
            StorageError: if it cannot be read.
        """
        with self._named("read"):
            there = self._count_there()
            if there <= self._count_here():
                return
            shutil.rmtree(self.local, ignore_errors=True)
            for name in self.names():
                target = self.local / name
                target.parent.mkdir(parents=True, exist_ok=True)
                self._fs.get_file(f"{self._root}/{name}", str(target))
            self._note(there)

    def push(self) -> None:
        """Copy what has changed since the last call; remove there what is not here.

        Raises:
            StorageError: if it cannot be written.
        """
        with self._named("written"):
            here = self._files()
            for name, seen in here.items():
                if self._pushed.get(name) != seen:
                    self._put(name)
                    self._pushed[name] = seen
            for name in set(self.names()) - set(here):
                self._fs.rm_file(f"{self._root}/{name}")
                self._pushed.pop(name, None)
            count = max(self._count_there(), self._count_here()) + 1
            # Last: what is there is whole then.
            self._fs.pipe_file(f"{self._root}/{_COUNT}", json.dumps(count).encode())
            self._note(count)

    def _files(self) -> dict[str, tuple[int, int]]:
        """Return name -> (bytes, time of change) of the files here that are copied."""
        found = {}
        for path in sorted(self.local.rglob("*")):
            is_passing = path.name.endswith(_BESIDE) or is_of_lock(path) or path.name == _COUNT
            if is_passing or not path.is_file():
                continue
            with suppress(FileNotFoundError):  # It was replaced just now.
                stat = path.stat()
                found[path.relative_to(self.local).as_posix()] = (stat.st_size, stat.st_mtime_ns)
        return found

    def _put(self, name: str) -> None:
        target = f"{self._root}/{name}"
        self._fs.makedirs(str(PurePosixPath(target).parent), exist_ok=True)
        path = self.local / name
        if path.suffix != _DATABASE:
            with suppress(FileNotFoundError):  # The next copy has what replaced it.
                self._fs.put_file(str(path), target)
            return
        # A database that is written to is copied as of one moment.
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "study.db"
            with (
                closing(sqlite3.connect(path, timeout=60.0)) as source,
                closing(sqlite3.connect(whole)) as copy,
            ):
                source.backup(copy)
            self._fs.put_file(str(whole), target)

    def _count_there(self) -> int:
        path = f"{self._root}/{_COUNT}"
        self._fs.invalidate_cache()
        return int(json.loads(self._fs.cat_file(path))) if self._fs.exists(path) else 0

    def _count_here(self) -> int:
        path = self.local / _COUNT
        return int(json.loads(path.read_text())) if path.exists() else 0

    def _note(self, count: int) -> None:
        self.local.mkdir(parents=True, exist_ok=True)
        (self.local / _COUNT).write_text(json.dumps(count))

    @contextmanager
    def _named(self, verb: str) -> Iterator[None]:
        """Name the errors of a file system in one line; each raises those of its own library."""
        try:
            yield
        except StorageError:
            raise
        except Exception as error:
            problem = f"cannot be {verb} ({one_line(error)[:200]})"
            remedy = f"check the address and your rights; what there is is in {self.local}"
            raise StorageError("output", self.url, problem, remedy) from None
