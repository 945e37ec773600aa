"""Files behind a URL of fsspec, on whatever file system it names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from autopeft.errors import StorageError
from autopeft.utils.formatting import one_line

_LOCAL = frozenset(("file", "local"))
_RENAMING = _LOCAL | {"sftp", "ssh"}
"""File systems on which a file is written bit by bit, and a new name replaces another at once:
`mv` is a rename in fsspec/implementations/local.py and sftp.py (`posix_rename`)."""

_BUCKETS = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"))
"""File systems of s3fs, gcsfs, adlfs, ocifs and ossfs: the first part of a path is no folder."""

_EXAMPLE = "s3://bucket/runs/first"
_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?:/(?!/)|$)")


def is_url(folder: object) -> bool:
    """Return whether a folder is named by a URL.

    Example:
        >>> from autopeft.utils.remote_files import is_url
        >>> is_url("s3://bucket/runs/first"), is_url("runs/first")
        (True, False)
    """
    return "://" in str(folder)


def check_no_url(folder: object) -> None:
    """Check that a path is not a URL that lost a slash, as `pathlib.Path` takes one away.

    Raises:
        StorageError: if it is, unless there is a folder of that name.
    """
    match = _ONE_SLASH.match(str(folder))
    if match is None or Path(str(folder)).exists():
        return
    from fsspec.registry import known_implementations

    if match[1].lower() in known_implementations:
        problem = f"is neither a folder nor a URL, which begins with {match[1]}://"
        raise StorageError(
            "output", str(folder), problem, f"give a URL such as {_EXAMPLE}, as text"
        )


class RemoteFiles:
    """The files below a URL.

    Args:
        url: A folder, such as `s3://bucket/runs/first`, `gs://...`, `file:///mnt/...`.
        is_alone: Whether to take a connection of its own, for use in a thread.

    Raises:
        StorageError: if it names no folder, or its file system is unknown, not installed, or does
            not answer.

    Attributes:
        url: The URL, without a slash at its end.
        name: The folder's name.
    """

    def __init__(self, url: str, *, is_alone: bool = False) -> None:
        _check_names_folder(url)
        self.url = url.rstrip("/")
        self._scheme = url.partition("://")[0].lower()
        try:
            import fsspec

            self._fs, root = fsspec.core.url_to_fs(self.url)
            if is_alone:
                given = self._fs.storage_options
                args = self._fs.storage_args
                self._fs = type(self._fs)(*args, **given, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            problem = f"cannot be opened ({one_line(error)[:200]})"
            remedy = "install the package of its file system, such as s3fs, or use a folder"
            raise StorageError("output", url, problem, remedy) from None
        except Exception as error:  # Some connect at once, each with errors of its own.
            problem = f"cannot be opened ({one_line(error)[:200]})"
            raise StorageError(
                "output", url, problem, "check the address and your rights"
            ) from None
        self._root = str(root).rstrip("/")
        if not self._root:
            raise _no_folder(url, "names no folder")
        self.name = PurePosixPath(self._root).name or "run"
        self._made: list[Path] = []

    def names(self) -> tuple[str, ...]:
        """Return the paths of all files, sorted; none that would lead out of the folder."""
        self._fs.invalidate_cache()
        found = self._fs.find(self._root) if self._fs.exists(self._root) else []
        names, above = [], f"{self._root}/"
        for path in map(str, found):
            if not path.startswith(above) and path != self._root:
                raise OSError(f"{path} is not in {self._root}")
            names.append(path.removeprefix(above))
        return tuple(sorted(name for name in names if is_inside(name)))

    def top(self) -> tuple[str, ...]:
        """Return the names of what is directly in the folder, without looking deeper."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            return ()
        names = {str(path).rstrip("/") for path in found} - {self._root}
        return tuple(sorted(PurePosixPath(name).name for name in names))

    def read(self, name: str) -> bytes | None:
        """Return what a file holds; None if there is none."""
        self._fs.invalidate_cache()
        try:
            content: bytes = self._fs.cat_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return None
        return content

    def write(self, name: str, content: bytes) -> None:
        """Replace a file."""
        with self._replaced(name) as target:
            self._fs.pipe_file(target, content)

    def put(self, path: Path, name: str) -> None:
        """Replace a file by one of this machine."""
        with self._replaced(name) as target:
            self._fs.put_file(str(path), target)

    def get(self, name: str, path: Path) -> None:
        """Copy a file to this machine."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fs.get_file(f"{self._root}/{name}", str(path))

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")

    @contextmanager
    def _replaced(self, name: str) -> Iterator[str]:
        """Yield where to write: beside the file, where a kill would leave half of it."""
        target = f"{self._root}/{name}"
        parent, last = target.rpartition("/")[::2]
        self._make(parent)
        if self._scheme not in _RENAMING:
            yield target
            return
        draft = f"{parent}/{draft_of(last)}"
        try:
            yield draft
            self._fs.mv(draft, target)
        except BaseException:
            with suppress(Exception):
                self._fs.rm_file(draft)
            raise

    def _make(self, folder: str) -> None:
        if self._scheme in _LOCAL:
            path = Path(folder)
            self._made += [p for p in (path, *path.parents) if not p.exists()]
        self._fs.makedirs(folder, exist_ok=True)

    def remove_made(self) -> None:
        """Remove the folders that were made here and are empty, where there are folders."""
        for path in sorted(self._made, key=lambda p: -len(p.parts)):
            with suppress(OSError):
                path.rmdir()
        self._made.clear()

    @contextmanager
    def named(self, verb: str, *, remedy: str = "") -> Iterator[None]:
        """Name the errors of a file system in one line; each raises those of its own library."""
        try:
            yield
        except StorageError:
            raise
        except Exception as error:
            problem = f"cannot be {verb} ({one_line(error)[:200] or type(error).__name__})"
            remedy = f"check the address and your rights{remedy}"
            raise StorageError("output", self.url, problem, remedy) from None


def draft_of(name: str) -> str:
    """Return the name that a file has until it is whole."""
    return f".{name}.draft"


def is_inside(name: str) -> bool:
    """Return whether a relative path stays in its folder; paths behind a URL are of others."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _check_names_folder(url: str) -> None:
    scheme, _, rest = url.partition("://")
    path = rest.strip("/")
    if not scheme:
        raise _no_folder(url, "names no file system")
    if not path:
        raise _no_folder(url, "names no folder")
    if scheme.lower() in _LOCAL and not rest.startswith(("/", "~")):
        problem = "the path of a file is full here: it begins with a slash"
        raise StorageError("output", url, problem, f"give {scheme}:///full/path, or the folder")
    if scheme.lower() in _BUCKETS and "/" not in path:
        raise _no_folder(url, "names a bucket and no folder in it")


def _no_folder(url: str, problem: str) -> StorageError:
    return StorageError("output", url, problem, f"name a folder in it, as in {_EXAMPLE}")
