"""Write files and folders atomically, so that an interrupted run leaves nothing half-written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autopeft.errors import StorageError


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically and sync it to disk; create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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


def write_text(path: Path, content: str) -> None:
    """Replace a file atomically with UTF-8 text; lone surrogates become `?`."""
    write_bytes(path, content.encode("utf-8", errors="replace"))


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

    If the block raises, `target` is left unchanged.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield draft
        for path in draft.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        draft.chmod(0o755)  # mkdtemp makes it private to the user
        if target.exists():
            shutil.rmtree(target)
        os.replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
