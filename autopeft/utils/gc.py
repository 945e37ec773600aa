"""Keeps Python's garbage collector from looking through the large libraries again and again."""

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


@contextmanager
def modules_at_rest() -> Iterator[None]:
    """A context in which garbage is looked for only among what is made inside.

    For a call that its caller waits for. Who has frozen something before finds it frozen after.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
