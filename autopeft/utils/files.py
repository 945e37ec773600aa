"""Writes a file whole or not at all, so that an interrupted run leaves no half report."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` in one step; folders above it are made.

    Raises:
        OSError: if the folder cannot be written; the old file is then untouched.
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
    """Replaces `path` in one step with UTF-8 text; surrogates that UTF-8 lacks become `?`."""
    write_bytes(path, content.encode("utf-8", errors="replace"))


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity replaced by None: what strict JSON can hold.

    Mappings become dicts with string keys, tuples and sets lists.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted((finite(v) for v in value), key=str)
    return value


def strict_json(value: Any) -> str:
    """Indented JSON without NaN.

    Raises:
        TypeError: if a value is not JSON-like.
    """
    return json.dumps(finite(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
