"""A callback that is called in a thread of its own, so that a slow one delays no trial."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any

from autopeft.errors import AutoPeftError
from autopeft.utils.formatting import one_line

_SECONDS_TO_OPEN = 30.0
"""How long the first trial waits for a tracker to be ready."""

_SECONDS_TO_CLOSE = 60.0
"""How long a search that has ended waits for a tracker to write the rest."""


class TrackerError(AutoPeftError):
    """A tracker cannot be used; the search goes on without it."""


class InBackground:
    """Calls a tracker's methods one after another in a thread.

    An error is raised at the next call, whichever that is. A search then switches this callback
    off; the tracker is closed by its `close`, if it has one, as it is after the search.

    Args:
        name: The tracker's name.
        make: Makes the tracker, and may import what it needs.
        remedy: What to do if that is not installed.

    Attributes:
        title: What a message says of it if it fails, whichever call told so.
    """

    def __init__(self, name: str, make: Callable[[], Any], remedy: str = "") -> None:
        self.name = name
        self.title = f"report_to={name} failed"
        self._make = make
        self._remedy = remedy
        self._tracker: Any = None
        self._calls: SimpleQueue[tuple[str, tuple[Any, ...], threading.Event | None]]
        self._calls = SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)

    @property
    def where(self) -> str:
        """Where the tracker writes, once the search has begun; "" if it does not say."""
        return str(getattr(self._tracker, "where", ""))

    def on_search_begin(self, search: Any) -> None:
        """Make the tracker, and wait until it is ready."""
        self._thread.start()
        self._wait("on_search_begin", search, seconds=_SECONDS_TO_OPEN)

    def on_search_end(self, result: Any) -> None:
        """Wait until everything is written."""
        self._wait("on_search_end", result, seconds=_SECONDS_TO_CLOSE)

    def __getattr__(self, event: str) -> Callable[..., None]:
        if not event.startswith("on_"):
            raise AttributeError(event)
        return partial(self._put, event)

    def _put(self, event: str, *arguments: Any, done: threading.Event | None = None) -> None:
        if self._error is not None:
            raise self._error
        self._calls.put((event, arguments, done))

    def _wait(self, event: str, argument: Any, *, seconds: float) -> None:
        done = threading.Event()
        self._put(event, argument, done=done)
        limit = time.monotonic() + seconds
        # The thread may have ended with an error just before the call.
        while not done.wait(0.1) and self._thread.is_alive():
            if time.monotonic() > limit:
                raise TrackerError(f"it took more than {seconds:.0f} seconds")
        if self._error is not None:
            raise self._error

    # In the thread

    def _work(self) -> None:
        is_over = False
        while not is_over:
            event, arguments, done = self._calls.get()
            try:
                self._call(event, arguments)
            except Exception as error:
                self._error = error
            is_over = event == "on_search_end" or self._error is not None
            if is_over and hasattr(self._tracker, "close"):
                with suppress(Exception):  # What matters was written, or an error told.
                    self._tracker.close()
            if done is not None:
                done.set()

    def _call(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._tracker is None:
            try:
                self._tracker = self._make()
            except ImportError as error:
                raise TrackerError(f"{one_line(error)}; {self._remedy}") from error
        method = getattr(self._tracker, event, None)
        if method is not None:
            method(*arguments)
