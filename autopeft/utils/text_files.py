"""Text of files that may come from anyone: its size, encoding and nesting are checked first."""

from __future__ import annotations

import csv
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.resources.abc import Traversable
from io import BytesIO
from pathlib import Path
from typing import Any

from autopeft.utils.formatting import human_bytes

MAX_JSON_BYTES = 256 * 2**20
"""Largest JSON file that is read. The scores of a million rows take a tenth of it."""

MAX_YAML_BYTES = 2**20
"""Largest YAML file that is read: the settings and spaces of people have a few kilobytes."""

MAX_DEPTH = 64
"""Deepest nesting of lists and mappings that is read. Files of autopeft nest eight deep."""

TOO_DEEP = f"is nested deeper than {MAX_DEPTH} levels, the most that is read"

MAX_DIGITS = 300
"""Most digits of a whole number: a larger one is no float, and none is meant."""

_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x00": "a binary file"}
"""First bytes of a file -> what it is instead of text in UTF-8."""


class Unreadable(ValueError):
    """A file's text or values cannot be used; the message completes "the file ..."."""


class NamedTwice(Unreadable):
    """A mapping of a file has a name twice, and of its values only the last would count.

    Args:
        name: The name.
        where: Its places, such as "at lines 3 and 8".
    """

    def __init__(self, name: str, where: str = "") -> None:
        super().__init__(f"names {name!r} twice {where}".rstrip())


def unlike_names(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return pairs as a mapping, or raise a NamedTwice if two have the same name.

    Example:
        >>> from autopeft.utils.text_files import unlike_names
        >>> unlike_names([("rank", 8), ("alpha", 16)])
        {'rank': 8, 'alpha': 16}
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise NamedTwice(name)
        found[name] = value
    return found


def read_text(path: Path | Traversable, *, max_bytes: int) -> str:
    """Return the text of a file in UTF-8, with or without its byte order mark.

    Raises:
        Unreadable: if there is no such file, it is not a regular file, is larger than `max_bytes`,
            or is not text in UTF-8.
    """
    try:
        # A pipe or device has no end, and opening it may wait for ever.
        is_regular = not isinstance(path, Path) or stat.S_ISREG(os.stat(path).st_mode)
        with path.open("rb") if is_regular else BytesIO() as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror or type(error).__name__})") from None
    except ValueError:  # of a NUL byte in the path
        raise Unreadable("cannot be read (no file has such a name)") from None
    if not is_regular:
        raise Unreadable("cannot be read (it is not a regular file)")
    if len(raw) > max_bytes:
        raise Unreadable(f"is larger than {human_bytes(max_bytes)}, the most that is read")
    for mark, kind in _MARKS.items():
        if raw.startswith(mark):
            raise Unreadable(f"cannot be read (it is {kind}, and text in UTF-8 is expected)")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"cannot be read (it is not UTF-8 at byte {error.start}, and must be)"
        ) from None


def parse_json(text: str) -> Any:
    """Return the values of JSON that is not too deep, with numbers that can be computed with.

    Raises:
        Unreadable: if it is not JSON, too deep, names a key twice, or holds a number without end.
    """
    if not text.strip():
        raise Unreadable("is not JSON (it is empty)")
    try:
        data = json.loads(text, object_pairs_hook=unlike_names, parse_int=whole_number)
    except RecursionError:
        raise Unreadable(TOO_DEEP) from None
    except Unreadable:
        raise
    except ValueError as error:
        raise Unreadable(f"is not JSON ({error})") from None
    check_depth(data)
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Unreadable("holds half a character (a lone surrogate)") from None
    return data


def whole_number(digits: str) -> int:
    """Return a number of JSON; raise an Unreadable if it has too many digits."""
    if len(digits) > MAX_DIGITS:
        raise Unreadable(f"holds a number of {len(digits)} digits; at most {MAX_DIGITS} are read")
    return int(digits)


def check_depth(data: Any) -> None:
    """Raise an Unreadable if lists and mappings are nested deeper than `MAX_DEPTH`."""
    level = [data]
    for _ in range(MAX_DEPTH + 1):
        level = [whole for whole in level if isinstance(whole, Mapping | list | tuple)]
        if not level:
            return
        level = [item for whole in level for item in _items(whole)]
    raise Unreadable(TOO_DEEP)


def _items(whole: Any) -> Iterable[Any]:
    return whole.values() if isinstance(whole, Mapping) else whole


@contextmanager
def long_fields() -> Iterator[None]:
    """Let fields of CSV be of any length; a document may have more than csv's limit."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
