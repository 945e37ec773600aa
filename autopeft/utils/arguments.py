"""What callers hand to the public functions, checked at the door and named as they wrote it."""

from __future__ import annotations

import errno
import operator
import os
from pathlib import Path
from typing import Any

from autopeft.errors import SettingsError, StorageError, UserError
from autopeft.utils.formatting import middle_cut

_LONGEST, _LONGEST_NAME = 4096, 255
"""Bytes of a path, and of a name in it, that Linux takes."""

_SHOWN = 60


def checked_text(
    name: str, value: Any, remedy: str, *, error: type[UserError] = SettingsError
) -> str:
    """Return a text that files and encoders can take.

    Args:
        name: The argument.
        value: Its value.
        remedy: What the user can do.
        error: The class of the error.

    Raises:
        UserError: of class `error`, if it is no text, empty, or holds a NUL or half a character.
    """
    if not isinstance(value, str):
        raise error(name, _shown(value), "must be text", remedy)
    if not value:
        raise error(name, value, "is empty", remedy)
    if "\x00" in value:
        raise error(name, middle_cut(value, _SHOWN), "holds a NUL character", "remove it")
    try:
        value.encode()
    except UnicodeEncodeError:
        problem = "holds half a character (a lone surrogate)"
        raise error(name, middle_cut(value, _SHOWN), problem, "write it in UTF-8") from None
    return value


def checked_path(name: str, value: Any, *, error: type[UserError] = StorageError) -> Path:
    """Return a path with `~` expanded; nothing needs to be there.

    Args:
        name: The argument.
        value: Text, or what `os.fspath` makes text.
        error: The class of the error.

    Raises:
        UserError: of class `error`, if it is no path, too long, a link to itself, or of a user who
            is not known here.

    Example:
        >>> from autopeft.utils.arguments import checked_path
        >>> checked_path("folder", "runs/first")
        PosixPath('runs/first')
    """
    if not isinstance(value, str | os.PathLike):
        raise error(name, _shown(value), "is no path", "give the path of a file or folder")
    text = checked_text(name, os.fspath(value), "give the path of a file or folder", error=error)
    shown = middle_cut(text, _SHOWN)
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        problem = "names a user who is not known here"
        raise error(name, shown, problem, "write the path without `~`") from None
    sizes = [len(os.fsencode(part)) for part in path.parts]
    if sum(sizes) + len(sizes) > _LONGEST or max(sizes, default=0) > _LONGEST_NAME:
        raise error(name, shown, "is longer than any path or name of a file", "shorten it")
    try:
        os.stat(path)
    except OSError as wrong:
        if wrong.errno == errno.ELOOP:
            problem = "is a link that leads to itself"
            raise error(name, shown, problem, "name what it leads to") from None
        if wrong.errno == errno.ENAMETOOLONG:
            problem = f"is no path here ({wrong.strerror})"
            raise error(name, shown, problem, "shorten it") from None
    return path


def checked_folder(name: str, value: Any, *, error: type[UserError] = StorageError) -> str | Path:
    """Return the path of a folder as `checked_path` does, or its URL.

    Args:
        name: The argument.
        value: A path, or the URL of a folder.
        error: The class of the error.

    Raises:
        UserError: of class `error`, if it is neither.
    """
    if isinstance(value, str) and "://" in value:
        return checked_text(name, value, "give a folder or a URL", error=error)
    return checked_path(name, value, error=error)


def checked_target(name: str, value: Any) -> Path:
    """Return the path of a file or folder that can be written, as far as its folder tells.

    Args:
        name: The argument.
        value: The path; nothing needs to be there.

    Raises:
        StorageError: if it is no path, or what it would be in is no folder, or not writable.
    """
    path = checked_path(name, value)
    parent = next(p for p in path.absolute().parents if os.path.lexists(p))
    if not parent.is_dir():
        raise StorageError(name, str(path), f"{parent} is no folder", "name another place")
    if not path.exists() and not os.access(parent, os.W_OK):
        raise StorageError(name, str(path), f"{parent} is not writable", "name another place")
    return path


def checked_count(name: str, value: Any, *, least: int, remedy: str) -> int:
    """Return a whole number, also one of numpy.

    Args:
        name: The argument.
        value: Its value.
        least: The lowest that is allowed.
        remedy: What the user can do.

    Raises:
        SettingsError: if it is no whole number, or lower.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise SettingsError(name, _shown(value), "must be a whole number", remedy) from None
    if number < least:
        raise SettingsError(name, number, f"`{name} >= {least}` must hold", remedy)
    return number


def _shown(value: object) -> object:
    """Return a value for a message, or its type: its text may be long, or fail."""
    try:
        text = repr(value)
    except Exception:
        return type(value).__name__
    return value if len(text) <= _SHOWN and "\n" not in text else type(value).__name__
