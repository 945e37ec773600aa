"""A training function of the user's own: what it is given, and the registry that finds it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from autopeft.errors import AutoPeftError, OutOfTime, TrainingFailure
from autopeft.plan import Candidate
from autopeft.training.step_clock import StepClock
from autopeft.utils.registry import Registry
from autopeft.utils.serialize import to_float

Metrics = Mapping[str, float]
Result = Metrics | tuple[Metrics, Sequence[float]]
"""What a training function returns: metrics, perhaps with the quality of each scored row."""

TEST = "test_"
"""Start of the names of metrics on rows that the search has not seen."""


class EvaluateFunction(Protocol):
    """Trains a candidate and returns its metrics.

    Example:
        ```python
        def evaluate(candidate, *, seed, report):
            model = my_training(candidate, seed, steps=report.rungs, after_each=report)
            return {"accuracy": accuracy_of(model)}
        ```
    """

    def __call__(self, candidate: Candidate, *, seed: int, report: TrialReport) -> Result:
        """Train the candidate.

        Args:
            candidate: Which adapters at which sites, and how to train them.
            seed: Seeds the initialization and the order of the data.
            report: To be called with a step and the quality so far; see `TrialReport`.

        Returns:
            Metrics by name, the quality among them; with the quality of each scored row, the
            verdict can compare candidates row by row. Where `report.is_confirming`, also the
            metrics of the test split under names that begin with "test_"; the rows are then its.
        """


class TrialStopped(AutoPeftError):
    """A trial was stopped early; let this leave the training function.

    Example:
        >>> def report(step, score):  # what a search gives the function
        ...     raise autopeft.TrialStopped("the trial was stopped")
        >>> try:
        ...     report(30, 0.2)
        ... except autopeft.TrialStopped:
        ...     print("close files, then raise again")
        close files, then raise again
    """


class TrialOutOfTime(TrialStopped):
    """A trial was stopped because the time that the search has for it was up."""


class TrialReport:
    """What a training function reports to, and what it can know of its job.

    Calling it with a step and the quality so far lets the search compare the trial with others at
    the same step. It returns if the training should go on.

    Args:
        rungs: Steps at which other trials report; the last one is the end.
        is_confirming: Whether a finalist is retrained: no other trial stops it, the test split is
            scored and its adapter is kept.
        folder: An empty folder; what is written there by a confirmation is the adapter.
        send: Sends a report, and raises a `TrialStopped` to end the training.
        clock: Knows the training's deadline, and tells how far it is.

    Example:
        >>> report = TrialReport(rungs=(10, 30), is_confirming=False, folder=Path("."))
        >>> report(10, 0.61)
        >>> report(5, 0.7)
        Traceback (most recent call last):
        ...
        autopeft.errors.TrainingFailure: reported step 5 after step 10; report steps in order
    """

    def __init__(
        self,
        *,
        rungs: tuple[int, ...],
        is_confirming: bool,
        folder: Path,
        send: Callable[[int, float], None] = lambda step, score: None,
        clock: StepClock | None = None,
    ) -> None:
        self.rungs = rungs
        self.is_confirming = is_confirming
        self.folder = folder
        self.last_step = 0
        self._send = send
        self._clock = clock or StepClock()

    @property
    def seconds_left(self) -> float:
        """Seconds until the search ends the training; inf without a time limit."""
        return self._clock.seconds_left

    def on_step(self, step: int, loss: float = math.nan) -> None:
        """Tell where the training is, after any step: it is shown, and the clock is read.

        Args:
            step: Optimizer steps done.
            loss: Training loss of the step.

        Raises:
            TrialStopped: if the training's time is up.
        """
        try:
            self._clock.after_step(step, loss, is_last=step >= self.rungs[-1])
        except OutOfTime as error:
            raise TrialOutOfTime(str(error)) from error

    def __call__(self, step: int, score: float) -> None:
        """Report the quality after a step, in the direction of the metric.

        Args:
            step: Optimizer steps done, larger than at the report before.
            score: The quality so far.

        Raises:
            TrialStopped: if the training should end now.
            TrainingFailure: if steps come out of order, or the score is no finite number.
        """
        number = _number(step)
        if number is None or number != int(number) or number < 1:
            raise TrainingFailure(f"reported step {step!r}; a step is a whole number from 1")
        if number <= self.last_step:
            raise TrainingFailure(
                f"reported step {step} after step {self.last_step}; report steps in order"
            )
        value = _number(score)
        if value is None:
            raise TrainingFailure(f"reported {score!r} at step {step}; report a finite number")
        self.last_step = int(number)
        self._send(int(number), value)


def _number(value: Any, *, truth: bool = False) -> float | None:
    """Return a finite number, or with `truth` a truth value, as a float; None for others."""
    number = to_float(value, truth=truth)
    return number if number is not None and math.isfinite(number) else None


def parse_result(result: Any, quality: str) -> tuple[dict[str, float], tuple[float, ...]]:
    """Return the metrics and the rows' qualities, () without them, of what a function returned.

    Raises:
        TrainingFailure: if it is neither metrics nor metrics with rows, or the quality is missing.
    """
    metrics, rows = result if isinstance(result, tuple) and len(result) == 2 else (result, ())
    if not isinstance(metrics, Mapping):
        raise TrainingFailure(
            f"evaluate returned {type(result).__name__}; "
            f"return metrics by name such as {{{quality!r}: 0.9}}, or (metrics, rows)"
        )
    found = {str(name): _number(value) for name, value in metrics.items()}
    if quality not in found:
        raise TrainingFailure(
            f"evaluate returned {', '.join(found) or 'no metrics'} without {quality!r}; "
            "return it, or name another metric"
        )
    bad = [name for name in (quality, TEST + quality) if name in found and found[name] is None]
    if bad:
        raise TrainingFailure(f"{bad[0]} is {metrics[bad[0]]!r}; return a finite number")
    scores = [_number(row, truth=True) for row in rows]
    if None in scores:
        place = scores.index(None)
        raise TrainingFailure(f"the quality of row {place} is {rows[place]!r}; return numbers")
    judged = found.get(TEST + quality, found[quality])
    mean = sum(s for s in scores if s is not None) / len(scores) if scores else judged
    if not math.isclose(mean or 0.0, judged or 0.0, rel_tol=1e-3, abs_tol=1e-4):
        raise TrainingFailure(
            f"the mean of the rows is {mean:.4g}, but {quality} is {judged:.4g}; "
            "return rows whose mean is the metric, or none"
        )
    return (
        {name: value for name, value in found.items() if value is not None},
        tuple(score for score in scores if score is not None),
    )


def _as_function(_name: str, part: Any) -> EvaluateFunction:
    if not callable(part) or isinstance(part, type):
        raise TypeError("must be a function of a candidate, with the keywords seed and report")
    try:
        inspect.signature(part).bind(None, seed=0, report=None)
    except (TypeError, ValueError) as wrong:
        raise TypeError(f"must take (candidate, *, seed, report) ({wrong})") from None
    function: EvaluateFunction = part
    return function


EVALUATORS: Registry[EvaluateFunction] = Registry(
    "function", "autopeft.evaluate", __name__, _as_function, keeps_given=False
)
"""Training functions; each search has at most one."""
