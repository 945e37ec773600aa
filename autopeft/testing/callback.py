"""Checks a callback: its methods are those of `Callback`, with their arguments."""

from __future__ import annotations

import inspect
from typing import Any

from autopeft.engine.callback import EVENTS, Callback
from autopeft.testing.requirement import Requirement
from autopeft.utils.serialize import nearest


def check_callback(callback: Any) -> None:
    """Check that a callback will be called: that no method's name or arguments are wrong.

    Args:
        callback: The object. It is not called.

    Raises:
        AssertionError: if it would not be; the message is one line.

    Example:
        >>> from autopeft.testing import check_callback
        >>> class Log:
        ...     def on_trial_ended(self, trial): ...
        >>> check_callback(Log())
        Traceback (most recent call last):
        ...
        AssertionError: callback Log: on_trial_ended is never called; did you mean ...
    """
    require = Requirement(f"callback {type(callback).__name__}")
    require.that(not isinstance(callback, type), "is a class; give an object")
    own = [name for name in dir(callback) if name.startswith("on_")]
    for name in own:
        require.that(name in EVENTS, f"{name} is never called; {nearest(name, EVENTS)}")
        _, *arguments = inspect.signature(getattr(Callback, name)).parameters
        try:
            inspect.signature(getattr(callback, name)).bind(*arguments)
        except TypeError as wrong:
            text = f"{name} must take ({', '.join(arguments)}): {wrong}"
            raise AssertionError(f"{require.part}: {text}") from None
    require.that(bool(own), f"has no method that is called; define e.g. {EVENTS[0]}")
