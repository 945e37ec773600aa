"""Callbacks: all are called; one that raises is named once and not called again."""

from __future__ import annotations

from typing import Any

from autopeft.engine.callback import Callback, CallbackList


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
