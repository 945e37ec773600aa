"""Callbacks: all are called; one that raises is named once and not called again."""

from __future__ import annotations

from typing import Any

import pytest

from autopeft.engine.callback import Callback, CallbackList, as_callbacks
from autopeft.errors import SettingsError


class Ears(Callback):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_message(self, text: str) -> None:
        self.heard.append(text)

    def on_trial_end(self, trial: Any) -> None:
        self.heard.append(f"trial {trial}")


class Broken:
    """Has one method, which raises."""

    def on_trial_end(self, trial: Any) -> None:
        raise OSError("no\nspace")


def test_a_callback_that_raises_is_switched_off() -> None:
    ears = Ears()
    callbacks = CallbackList([Broken(), ears])
    callbacks.call("on_trial_end", 1)
    callbacks.call("on_trial_end", 2)
    callbacks.call("on_rung", 2, 30, 0.5)  # Nobody listens.
    told = (
        "callback Broken failed in on_trial_end (OSError: no space); "
        "it is switched off, the search goes on"
    )
    assert ears.heard == [told, "trial 1", "trial 2"]
    assert callbacks.failures == [told]


def test_a_search_is_interrupted_by_a_callback_only_on_purpose() -> None:
    class Stop:
        def on_trial_end(self, trial: Any) -> None:
            raise KeyboardInterrupt

    try:
        CallbackList([Stop()]).call("on_trial_end", 1)
    except KeyboardInterrupt:
        return
    raise AssertionError("an interrupt must leave")


def test_one_callback_is_enough_and_a_mistaken_one_is_refused() -> None:
    ears = Ears()
    assert as_callbacks(ears) == as_callbacks([ears]) == (ears,)

    class Typo:
        def on_trial_ended(self, trial: Any) -> None:
            pass

    for given, problem in (
        (Typo(), "on_trial_ended is no event.*did you mean 'on_trial_end'"),
        (Ears, r"is a class, not a callback; give Ears\(\)"),
        ([object()], "has no method of autopeft.Callback"),
    ):
        with pytest.raises(SettingsError, match=problem):
            as_callbacks(given)
