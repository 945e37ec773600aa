"""Calls something again and again, whatever the main thread does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

_LAST_CALL_SECONDS = 5.0


class Timer:
    """Calls a function at an interval in a thread, while the block runs.

    A call that raises is left out; the next one may succeed.

    Args:
        function: What is called; it must be safe in another thread.
        seconds: From one call to the next.
        on_error: Is told what a call raised, in that thread.
    """

    def __init__(
        self,
        function: Callable[[], None],
        seconds: float,
        *,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        self._function = function
        self._seconds = seconds
        self._on_error = on_error
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="autopeft-timer", daemon=True)

    def _run(self) -> None:
        while not self._is_over.wait(self._seconds):
            try:
                self._function()
            except Exception as error:  # A full disk or a lost database may come back.
                if self._on_error is not None:
                    self._on_error(error)

    def __enter__(self) -> Timer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()
        # A call that waits for a database does not hold up the end.
        self._thread.join(timeout=_LAST_CALL_SECONDS)
