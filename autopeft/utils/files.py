"""Write files atomically, so that an interrupted run leaves no partial file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically and sync it to disk; create its folder.

    Raises:
        OSError: if it cannot be written; the old file is then left unchanged.
    """
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
