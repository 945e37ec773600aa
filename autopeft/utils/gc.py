"""Pauses Python's garbage collector while large libraries load and run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_gc() -> Iterator[None]:
    """Disable garbage collection inside the context. May be nested.

    Module objects live as long as the process. Scanning them repeatedly takes a fifth of the import
    time of torch, transformers and peft.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def frozen_gc() -> Iterator[None]:
    """Exclude everything that exists now from garbage collection inside the context.

    For a call that blocks its caller. Objects that the caller froze before stay frozen.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
