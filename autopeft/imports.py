"""Imports the large libraries as fast as they can be."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """A context in which Python does not look for garbage.

    What modules are made of lives as long as the process, and looking through it again and again
    takes a fifth of the time that torch, transformers and peft take to import. May be nested.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
