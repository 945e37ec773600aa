"""The trackers by name. Light: a tracker's library is imported when a search reports to it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, overload

from autopeft.engine.callback import EVENTS
from autopeft.integrations.trackers.background import InBackground
from autopeft.utils.registry import Registry

F = TypeVar("F")

BUILT_IN = {
    "mlflow": "MlflowTracker",
    "wandb": "WandbTracker",
    "trackio": "TrackioTracker",
    "tensorboard": "TensorBoardTracker",
}
"""Trackers that come with autopeft, and their classes; each has a module and an extra."""


def _as_tracker(_name: str, part: Any) -> Callable[[], Any]:
    if not callable(part):
        raise TypeError("must be a class of callbacks; give a callback itself as callbacks=[...]")
    if isinstance(part, type) and not any(hasattr(part, name) for name in EVENTS):
        raise TypeError(f"has no method of autopeft.Callback, such as {EVENTS[4]}")
    made: Callable[[], Any] = part
    return made


TRACKERS: Registry[Callable[[], Any]] = Registry(
    "tracker", "autopeft.trackers", __name__, _as_tracker, is_carried=False
)
"""Every tracker: a class of callbacks that is made without arguments."""


@overload
def register_tracker(name: str, tracker: None = None) -> Callable[[F], F]: ...
@overload
def register_tracker(name: str, tracker: F) -> F: ...
def register_tracker(name: Any, tracker: Any = None) -> Any:
    """Register a tracker, so that `report_to` can name it.

    A call, or a decorator of a class of callbacks that is made without arguments. A search makes
    one and calls it in a thread of its own, so that no trial waits for it. A package offers one
    with an entry point of the group `autopeft.trackers`.

    Args:
        name: What `report_to` calls it.
        tracker: The class, or where it is found, as `module:name`.

    Returns:
        The class, or a decorator.

    Raises:
        SettingsError: if the name stands for another tracker.

    Example:
        >>> @autopeft.register_tracker("notebook")
        ... class Notebook(autopeft.Callback):
        ...     def on_trial_end(self, trial):
        ...         with open("trials.txt", "a") as file:
        ...             print(trial.number, trial.state, dict(trial.values), file=file)
        >>> settings = {"report_to": ["notebook"]}  # autopeft.search(..., report_to=["notebook"])
    """
    return TRACKERS.door(name, tracker)


def _late(module: str, name: str) -> Callable[[], Any]:
    """Return a tracker whose library is imported when it is made, and may be missing until then."""

    def make() -> Any:
        return getattr(importlib.import_module(f"autopeft.integrations.trackers.{module}"), name)()

    return make


for _name, _class in BUILT_IN.items():
    register_tracker(_name, _late(_name, _class))


def make_trackers(names: Iterable[str]) -> list[InBackground]:
    """Return the trackers that a search reports to; their libraries are not imported yet.

    Raises:
        SettingsError: if there is no tracker of a name.
    """
    return [
        InBackground(name, TRACKERS.resolve("report_to", name), _remedy(name))
        for name in dict.fromkeys(names)
    ]


def _remedy(name: str) -> str:
    return f'pip install "autopeft[{name}]"' if name in BUILT_IN else "install what it needs"


def destinations(callbacks: Iterable[Any]) -> str:
    """Return where those of the callbacks that are trackers write, on one line; "" for none."""
    trackers = [each for each in callbacks if isinstance(each, InBackground)]
    return ", ".join(f"{t.name} ({t.where})" if t.where else t.name for t in trackers)
