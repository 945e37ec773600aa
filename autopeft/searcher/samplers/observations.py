"""What a sampler knows: the history of trials, and the qualities observed or estimated from it."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopeft.costs.objectives import Objective
from autopeft.searcher.latest_trials import LatestTrials
from autopeft.searcher.pruners.rung_table import Line
from autopeft.searcher.space.encoding import Point, PointKey
from autopeft.searcher.space.space import SearchSpace
from autopeft.trial import INTERRUPTED, Trial
from autopeft.utils.extremes import usable
from autopeft.utils.ranks import correlation_interval, rank_correlation

Array = NDArray[np.float64]

_MIN_TO_FIT = 5
"""Complete trials needed to predict final qualities from the scores at a rung."""

_TELLS, _ONE_SIDED = 0.9, 1.645
"""A rung predicts final qualities if its rank correlation is this for sure (95 %, one-sided).

Below it, a model learns that what learns slowly is bad. See guides/measurements.md, pruning."""


class History:
    """The trials of a search and their points, updated incrementally.

    An update looks only at trials that are new or were running at the last one.

    Args:
        space: The search space.
        quality: The quality objective.

    Attributes:
        trials: All trials, in the order they were started.
        points: The point of each; None for a candidate outside the space.
        latest: Key of a point -> index of the latest trial of it.
        ended: Indices of the trials that ended, in the order this was noticed.
        running: Indices of the running trials, in order; the keys.
        complete: Indices of the complete trials in the space.
        pruned: Indices of the pruned trials in the space.
        failed: Indices of the trials in the space that failed, unless their search was killed.
        n_pruned: Number of pruned trials, in the space or not.
        outside: Indices of the complete trials outside the space.
        quality: Final quality of each trial, larger is better; NaN unless complete.
    """

    def __init__(self, space: SearchSpace, quality: Objective) -> None:
        self._space = space
        self._quality = quality
        self._source: LatestTrials | None = None
        self._clear()

    def _clear(self) -> None:
        self.trials: list[Trial] = []
        self.points: list[Point | None] = []
        self.latest: dict[PointKey, int] = {}
        self.ended: list[int] = []
        self.running: dict[int, None] = {}
        self.complete: list[int] = []
        self.pruned: list[int] = []
        self.failed: list[int] = []
        self.n_pruned = 0
        self.outside: list[int] = []
        self.quality: list[float] = []
        self._scores: dict[int, list[float]] = {}
        self._n_changes = 0  # of `LatestTrials`, that were read

    def update(self, trials: Sequence[Trial]) -> None:
        """Read what changed in all trials, given in the order they were started."""
        n = len(self.trials)
        if len(trials) < n or (n and trials[n - 1].number != self.trials[-1].number):
            self._clear()
            self._source = None
            n = 0
        for index in self._changed(trials, n):
            trial = trials[index]
            if index < n:
                self.trials[index] = trial
            else:
                self.trials.append(trial)
                self.quality.append(np.nan)
                self.points.append(self._space.encoder.point_of(trial.candidate))
            self._read(index, trial, self.points[index])

    def _changed(self, trials: Sequence[Trial], n: int) -> Iterable[int]:
        """Return the indices of trials that are new or were running, sorted."""
        if not isinstance(trials, LatestTrials):
            return [*self.running, *range(n, len(trials))]
        # A thousand may run, few of which have changed.
        changed = trials.changes[self._n_changes if trials is self._source else 0 :]
        self._source, self._n_changes = trials, len(trials.changes)
        return sorted({index for index in changed if index >= n or index in self.running})

    def _read(self, index: int, trial: Trial, point: Point | None) -> None:
        if point is not None:
            self.latest[point.key] = max(index, self.latest.get(point.key, 0))
        if trial.state == "running":
            self.running[index] = None
            return
        self.running.pop(index, None)
        self.ended.append(index)
        if trial.state == "complete":
            self.quality[index] = self._quality.sign() * trial.values[self._quality.name]
            insort(self.outside if point is None else self.complete, index)
        elif trial.state == "pruned":
            self.n_pruned += 1
            if point is not None:
                insort(self.pruned, index)
        elif trial.reason != INTERRUPTED and point is not None:
            insort(self.failed, index)
        for step, score in trial.rungs:
            column = self._scores.setdefault(step, [])
            column += [np.nan] * (index + 1 - len(column))
            column[index] = self._quality.sign() * score

    def scores_at(self, step: int) -> Array:
        """Return the scores of ended trials at a rung, shape (len(self.trials),).

        Larger is better; NaN where there is none. Extremes are clipped, as in `qualities`.
        """
        scores = np.full(len(self.trials), np.nan)
        column = self._scores.get(step, [])
        scores[: len(column)] = column
        return usable(scores)

    def qualities(self) -> Array:
        """Return `quality` without extremes that a model could not use, shape (len(self.trials),).

        One diverged perplexity may be finite and still beyond all arithmetic.
        """
        return usable(self.quality)


@dataclass(frozen=True)
class Observations:
    """Points and their qualities.

    Attributes:
        points: The points.
        values: Quality of each, larger is better, shape (n,).
        noise: Standard deviation of an estimated quality, else 0; shape (n,).
        is_final: False for qualities estimated from a rung, shape (n,).
        trials: The trial of each point; None for a point without one.
    """

    points: tuple[Point, ...]
    values: Array
    noise: Array
    is_final: NDArray[np.bool_]
    trials: tuple[Trial | None, ...]

    @classmethod
    def of(cls, history: History, n_max: int) -> Observations:
        """Return the complete trials, and pruned ones at the quality their last rung predicts.

        If they are more than `n_max`, good, late and final ones are preferred.
        """
        estimates = _predict_final(history)
        rows = np.array([*history.complete, *estimates], dtype=np.int64)
        is_final = np.arange(len(rows)) < len(history.complete)
        values = history.qualities()[rows] if len(rows) else np.zeros(0)
        noise = np.zeros(len(rows))
        if estimates:
            values[~is_final], noise[~is_final] = np.array(list(estimates.values())).T
        if len(rows) > n_max:
            score = values.argsort().argsort() / len(rows) + 0.5 * np.arange(len(rows)) / len(rows)
            score += 0.3 * is_final
            kept = np.sort(np.argsort(-score)[:n_max])
            rows, values, noise, is_final = rows[kept], values[kept], noise[kept], is_final[kept]
        points = tuple(p for i in rows if (p := history.points[i]) is not None)
        return cls(points, values, noise, is_final, tuple(history.trials[i] for i in rows))

    def extended(
        self, points: Sequence[Point], values: Array, noise: Array, *, is_final: bool = True
    ) -> Observations:
        """Add points without a trial of their own, at an expected quality."""
        return Observations(
            (*self.points, *points),
            np.append(self.values, values),
            np.append(self.noise, noise),
            np.append(self.is_final, np.full(len(points), is_final)),
            (*self.trials, *(None for _ in points)),
        )


def _predict_final(history: History) -> dict[int, tuple[float, float]]:
    """Predict the final quality of each pruned trial from its score at its last rung.

    The prediction is a linear regression of final qualities on scores, over the complete trials,
    where the ranks at the rung are nearly those at the end. The complete trials are those that
    rungs let pass, so the correlation over all trials is rather higher.
    Return index of the trial -> (quality, standard deviation), sorted by index, without the trials
    that have no usable prediction.
    """
    last = {i: max(history.trials[i].rungs)[0] for i in history.pruned if history.trials[i].rungs}
    steps = sorted(set(last.values()))
    lines = {step: _Line.fit(history, step) for step in steps}
    scores = {step: history.scores_at(step) for step in steps}
    found = {}
    for index, step in last.items():
        line, score = lines[step], float(scores[step][index])
        if line is not None and np.isfinite(score):
            found[index] = line.predict(score)
    return found


@dataclass(frozen=True)
class _Line:
    """A rung's line with its noise, clipped to a range."""

    line: Line
    low: float
    high: float
    noise: float

    @classmethod
    def fit(cls, history: History, step: int) -> _Line | None:
        """Fit to the complete trials with a score at a step; None if they tell too little."""
        rows = np.array(history.complete, dtype=np.int64)
        x, y = history.scores_at(step)[rows], history.qualities()[rows]
        is_known = np.isfinite(x) & np.isfinite(y)
        x, y = x[is_known], y[is_known]
        if len(x) < _MIN_TO_FIT:
            return None
        if correlation_interval(rank_correlation(x, y), len(x), _ONE_SIDED)[0] < _TELLS:
            return None
        line = Line.fit(x, y)
        error = float(np.sqrt(np.mean((y - line.at(x)) ** 2)))
        # Pruned trials score below most complete ones, so allow predictions below the range.
        low = float(y.min()) - 0.5 * float(np.ptp(y))
        noise = max(error, 0.1 * float(y.std()))
        return cls(line, low, float(y.max()), noise)

    def predict(self, score: float) -> tuple[float, float]:
        """Return the expected quality and its standard deviation."""
        return min(max(self.line.at(score), self.low), self.high), self.noise
