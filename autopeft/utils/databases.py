"""What the URL of a database says, without a database library, which takes a moment to load."""

from __future__ import annotations

import re

_IN_MEMORY = re.compile(
    r"sqlite(\+\w+)?:/{0,3}(\?.*|(file:)?:memory:.*)?|sqlite.*[?&]mode=memory(&.*)?", re.IGNORECASE
)


def is_in_memory(url: str) -> bool:
    """Return whether a URL is that of a SQLite database that ends with its connection.

    Example:
        >>> from autopeft.utils.databases import is_in_memory
        >>> is_in_memory("sqlite:///:memory:"), is_in_memory("sqlite:///study.db")
        (True, False)
    """
    return _IN_MEMORY.fullmatch(url) is not None
