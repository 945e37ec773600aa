"""Callbacks: what hears of a search while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from autopeft.confirm.finalists import SeedScore
from autopeft.costs.objectives import Objective
from autopeft.engine.messages import StepMessage
from autopeft.errors import AutoPeftError, SettingsError
from autopeft.plan import Candidate
from autopeft.trial import Trial
from autopeft.utils.formatting import one_line
from autopeft.utils.serialize import nearest

Phase = Literal["search", "confirmation", "done"]


@dataclass(frozen=True)
class Progress:
    """The state of a search after a change, or after a second without one.

    Attributes:
        objectives: Quality first.
        n_trials: Ended trials by state: complete, pruned, failed.
        ended: The trial that ended last in this run, if any.
        front: The front so far, cheapest first.
        n_running: Jobs that workers are running.
        n_confirmed: Confirmations done.
        n_to_confirm: Confirmations planned; 0 during the search.
        seconds_left: Seconds left of the budget; inf without a time limit.
        steps: How far the running jobs are, those that told it.
    """

    phase: Phase
    objectives: tuple[Objective, ...]
    n_trials: Mapping[str, int]
    ended: Trial | None
    front: tuple[Trial, ...]
    n_running: int
    n_confirmed: int
    n_to_confirm: int
    seconds_left: float
    steps: tuple[StepMessage, ...] = ()


@dataclass(frozen=True)
class SearchStart:
    """What is known of a search when it starts or is resumed.

    Attributes:
        folder: Its output folder.
        study_name: Name of its Optuna study.
        settings: As resolved, plain values.
        objectives: Quality first, then costs.
        is_resumed: Whether it was begun before.
        id: Tells it from other searches, and stays when it is resumed.
        trials: Those that ended before it was resumed, by number.

    Example:
        >>> quality = autopeft.Objective("accuracy", "maximize")
        >>> start = autopeft.SearchStart(Path("runs/first"), "first", {"steps": 90}, (quality,))
        >>> start.settings["steps"]
        90
    """

    folder: Path
    study_name: str
    settings: Mapping[str, Any]
    objectives: tuple[Objective, ...]
    is_resumed: bool = False
    id: str = ""
    trials: tuple[Trial, ...] = ()


class Callback:
    """Hears of a search while it runs; each method does nothing unless it is overridden.

    A callback need not be a subclass: methods that it lacks are not called. All calls come from the
    driver's main thread. One that raises is named in a warning and not called again; the search
    goes on.

    Example:
        >>> class Losses(autopeft.Callback):
        ...     def on_trial_end(self, trial):
        ...         print(trial.number, trial.state, dict(trial.values))
        >>> callbacks = [Losses()]  # autopeft.search(..., callbacks=callbacks)
    """

    def on_message(self, text: str) -> None:
        """Handle a line for the user."""

    def on_search_begin(self, search: SearchStart) -> None:
        """Handle the start of a search, when all its settings are checked."""

    def on_trial_begin(self, trial: Trial) -> None:
        """Handle a trial that goes to a worker."""

    def on_rung(self, trial: Trial, step: int, score: float) -> None:
        """Handle a report.

        Args:
            trial: The trial, still running or just pruned.
            step: Optimizer steps done.
            score: What the pruner compares, in the direction of the quality: minus the validation
                loss for a maximized metric of a task; the reported quality of a function.
        """

    def on_trial_end(self, trial: Trial) -> None:
        """Handle a trial that is complete, pruned or failed."""

    def on_confirmation(
        self, candidate: Candidate, score: SeedScore, files: Mapping[str, bytes]
    ) -> None:
        """Handle a finalist's retraining.

        Args:
            candidate: What was retrained.
            score: Its seed, and its metrics on both splits.
            files: Its adapter: relative path -> content.
        """

    def on_progress(self, progress: Progress) -> None:
        """Handle the state of the search: after any change, and about every second."""

    def on_search_end(self, result: Any) -> None:
        """Handle the `SearchResult`, also that of an interrupted search."""


EVENTS: tuple[str, ...] = tuple(name for name in vars(Callback) if name.startswith("on_"))
"""Methods that a callback can have."""


def as_callbacks(given: Any) -> tuple[Any, ...]:
    """Return the callbacks that a user gave: one, or several.

    Raises:
        SettingsError: if one is a class, or has a method of a mistaken name.
    """
    several = given if isinstance(given, Iterable) else (given,)
    callbacks = tuple(several)
    for callback in callbacks:
        if isinstance(callback, type):
            problem, remedy = "is a class, not a callback", f"give {callback.__name__}()"
            raise SettingsError("callbacks", callback.__name__, problem, remedy)
        shown = type(callback).__name__
        wrong = [name for name in dir(callback) if name.startswith("on_") and name not in EVENTS]
        if wrong:
            problem = f"{wrong[0]} is no event, so it would never be called"
            raise SettingsError("callbacks", shown, problem, nearest(wrong[0], EVENTS))
        if not any(callable(getattr(callback, name, None)) for name in EVENTS):
            problem = "has no method of autopeft.Callback"
            raise SettingsError("callbacks", shown, problem, f"define e.g. {EVENTS[4]}")
    return callbacks


@dataclass
class CallbackList:
    """Calls every callback, and switches off one that raises.

    Attributes:
        callbacks: What is called.
        failures: A line for each that was switched off.
    """

    callbacks: Iterable[Any] = ()
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.callbacks = list(self.callbacks)

    def call(self, event: str, *arguments: Any) -> None:
        """Call a method of every callback that has it."""
        for callback in tuple(self.callbacks):
            method = getattr(callback, event, None)
            if method is None:
                continue
            try:
                method(*arguments)
            except Exception as error:
                reason = str(error) if isinstance(error, AutoPeftError) else one_line(error)
                name = getattr(callback, "title", "")
                what = name or f"callback {type(callback).__name__} failed in {event}"
                text = f"{what} ({reason[:300]}); it is switched off, the search goes on"
                self.failures.append(text)
                self.callbacks = [other for other in self.callbacks if other is not callback]
                self.call("on_message", text)
