"""What a process does when it is told to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ENDING = tuple(getattr(signal, n) for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n))
"""Signals with which a batch system or a closed terminal ends a process."""


@contextmanager
def terminable() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into KeyboardInterrupt: a terminated search is saved like Ctrl-C.

    A signal that is ignored stays so (`nohup`). Outside of the main thread nothing changes.
    """
    with _handled(_ENDING, signal.default_int_handler):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a block run to its end: a notebook's kernel may be interrupted twice."""
    with _handled((signal.SIGINT, *_ENDING), signal.SIG_IGN):
        yield


@contextmanager
def postponed() -> Iterator[None]:
    """Let a block run to its end before it is interrupted; a second signal interrupts it at once.

    An exception out of nowhere in the middle of a transaction leaves it, and what made it, in a
    state that its library does not expect.
    """
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    try:
        with _handled((signal.SIGINT, *_ENDING), note):
            yield
    finally:
        for number in came:
            signal.raise_signal(number)


@contextmanager
def _handled(signals: tuple[signal.Signals, ...], handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    present = {each: signal.getsignal(each) for each in signals}
    before = {each: now for each, now in present.items() if now is not signal.SIG_IGN}
    try:
        for each in before:
            signal.signal(each, handler)
        yield
    finally:
        for each, previous in before.items():
            # None: a handler that was not set from Python.
            signal.signal(each, signal.SIG_DFL if previous is None else previous)
