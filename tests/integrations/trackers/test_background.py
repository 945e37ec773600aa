"""A tracker in a thread: order is kept, an error is told once, nobody waits for a slow one."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any

import pytest

from autopeft.engine.callback import CallbackList
from autopeft.integrations.trackers import background
from autopeft.integrations.trackers.background import InBackground


class Diary:
    where = "a drawer"

    def __init__(self) -> None:
        self.lines: list[Any] = []
        self.hold = threading.Event()

    def on_search_begin(self, search: Any) -> None:
        self.lines.append(search)

    def on_rung(self, trial: int, step: int, score: float) -> None:
        self.hold.wait(10)
        self.lines.append((trial, step, score))

    def on_trial_end(self, trial: int) -> None:
        raise OSError(f"no space for {trial}")

    def on_search_end(self, result: Any) -> None:
        self.lines.append(result)

    def close(self) -> None:
        self.lines.append("closed")


def told(callbacks: CallbackList, *events: tuple[Any, ...]) -> None:
    for event in events:
        callbacks.call(*event)


def test_calls_are_made_in_order_and_nobody_waits() -> None:
    diary = Diary()
    tracker = InBackground("diary", lambda: diary)
    callbacks = CallbackList([tracker])
    told(callbacks, ("on_search_begin", "start"), ("on_rung", 1, 3, 0.5), ("on_rung", 1, 9, 0.6))
    assert tracker.where == "a drawer"
    assert diary.lines == ["start"]  # The search goes on, the tracker has not.
    diary.hold.set()
    told(callbacks, ("on_trial_begin", 2), ("on_search_end", "result"))
    assert diary.lines == ["start", (1, 3, 0.5), (1, 9, 0.6), "result", "closed"]
    assert callbacks.failures == []
    assert not tracker._thread.is_alive()


def test_an_error_is_told_at_a_later_call_and_ends_the_tracker() -> None:
    diary = Diary()
    callbacks = CallbackList([InBackground("diary", lambda: diary)])
    told(callbacks, ("on_search_begin", "start"), ("on_trial_end", 7), ("on_search_end", "result"))
    told(callbacks, ("on_search_end", "again"))
    assert callbacks.failures == [
        "report_to=diary failed (OSError: no space for 7); it is switched off, the search goes on"
    ]
    assert diary.lines == ["start", "closed"]


def test_a_missing_library_is_told_with_its_extra() -> None:
    def make() -> Any:
        importlib.import_module("no_such_library")

    callbacks = CallbackList([InBackground("diary", make, 'pip install "autopeft[diary]"')])
    told(callbacks, ("on_search_begin", "start"), ("on_search_end", "result"))
    assert callbacks.failures == [
        "report_to=diary failed (ModuleNotFoundError: No module named "
        "'no_such_library'; pip install \"autopeft[diary]\"); "
        "it is switched off, the search goes on"
    ]


@pytest.mark.parametrize("event", ["on_search_begin", "on_search_end"])
def test_one_that_does_not_answer_is_given_up(event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_SECONDS_TO_OPEN", 5.0 if event == "on_search_end" else 0.1)
    monkeypatch.setattr(background, "_SECONDS_TO_CLOSE", 0.1)
    answer = threading.Event()
    hanging: Callable[[Any], Any] = lambda argument: answer.wait(10)  # noqa: E731
    diary = Diary()
    setattr(diary, event, hanging)
    callbacks = CallbackList([InBackground("diary", lambda: diary)])
    told(callbacks, ("on_search_begin", "start"), ("on_search_end", "result"))
    answer.set()
    (line,) = callbacks.failures
    assert "report_to=diary failed (it took more than 0 seconds)" in line
