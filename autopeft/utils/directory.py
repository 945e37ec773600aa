"""The working directory, which a user's function may change or remove."""

from __future__ import annotations

import os


def working_directory() -> str:
    """Return the working directory; "" if it was removed."""
    try:
        return os.getcwd()
    except OSError:
        return ""
