"""Ends what hangs in this process, where the search itself has to wait for it."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from autopeft.engine.watch import Watch

_WORKER = "this process"

_SIGNAL: int = getattr(signal, "SIGVTALRM", signal.SIGINT)
"""Interrupts the main thread. Not SIGINT, which a job in the background of a shell ignores."""

_STUCK = (
    "this process hangs ({}) and does not react; end it with `kill -9` and resume the search, with "
    "--backend ray if it hangs again, which replaces such workers"
)


class Hung(Exception):
    """What ran in the main thread made no progress and was interrupted; says for how long."""


class LocalWatch:
    """Watches the main thread from another one, and interrupts it with a signal of its own.

    Python raises in the main thread as soon as what runs in C returns or can be interrupted. What
    does neither cannot be ended from within a process, nor can what runs in another thread; then
    it says so.

    Args:
        watch: Decides what hangs.
        tell: Takes a line for the user.
        every: Seconds between two looks.
    """

    def __init__(self, watch: Watch, tell: Callable[[str], None], *, every: float = 1.0) -> None:
        self._watch = watch
        self._tell = tell
        self._every = every
        self._lock = threading.Lock()
        self._is_left = threading.Event()
        self._ends_at = math.inf
        self._is_watching = False
        self._hung: str | None = None
        self._is_told = False
        is_main = threading.current_thread() is threading.main_thread()
        self._can_interrupt = is_main and hasattr(signal, "pthread_kill")
        self._handler: Any = None
        self._thread = threading.Thread(target=self._look_often, name="watch", daemon=True)

    def __enter__(self) -> LocalWatch:
        if self._can_interrupt:
            self._handler = signal.signal(_SIGNAL, signal.default_int_handler)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_left.set()
        self._thread.join()
        if self._can_interrupt:
            # None: a handler that was not set from Python.
            signal.signal(_SIGNAL, signal.SIG_DFL if self._handler is None else self._handler)

    @contextmanager
    def watching(self, seconds_left: float, *, is_starting: bool = False) -> Iterator[None]:
        """Watch a block; the budget ends in `seconds_left`.

        Raises:
            Hung: if the block hung and could be interrupted.
        """
        try:
            with self._lock:
                self._ends_at = time.monotonic() + seconds_left
                self._watch.beat(_WORKER, time.process_time(), is_starting=is_starting)
                self._is_watching = True
                self._hung = None
            try:
                yield
            finally:
                with self._lock:
                    self._is_watching = False
                    self._watch.end(_WORKER)
        except KeyboardInterrupt:
            hung, self._hung = self._hung, None
            if hung is None:  # The user's own.
                raise
            raise Hung(hung) from None

    def sign(self, *_: Any) -> None:
        """Note that the main thread goes on."""
        with self._lock:
            self._watch.sign(_WORKER)

    def _look_often(self) -> None:
        while not self._is_left.wait(self._every):
            with self._lock:
                if self._is_watching:
                    self._look()

    def _look(self) -> None:
        self._watch.beat(_WORKER, time.process_time())
        is_over = time.monotonic() > self._ends_at
        problem = self._watch.problem(_WORKER, is_over=is_over)
        if problem is None:
            return
        if self._hung is None and self._can_interrupt:
            self._hung = problem
            signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL)
            self._watch.end(_WORKER)  # From now on it may be silent for as long again.
        elif not self._is_told:
            self._is_told = True
            # The main thread does not call them meanwhile.
            self._tell(_STUCK.format(problem))
