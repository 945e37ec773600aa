"""The gaps of trials at rungs: what the gap pruner decides by. Free of Optuna and Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from autopeft.utils.extremes import bounded

Array = NDArray[np.float64]

_EARLY = 1.0 / 3.0
"""Share of a training in which rungs may stop it."""

_MAX_GAPS = 512
"""Number of gaps that a trial is compared with at most."""

_FEWEST = 6
"""Complete trials that a prediction needs."""

_WORST = -1e300
"""Replaces a score that is not finite, such that differences stay finite."""


class RungTable:
    """Costs and scores of all trials, and each trial's gap at each rung, updated incrementally.

    Args:
        n_costs: Number of costs; 0 if all trials cost the same.
        n_further: Number of further qualities that trials report beside the score. A trial is
            behind only such others that are no worse in these, at the same step, either.
    """

    def __init__(self, n_costs: int, n_further: int = 0) -> None:
        self._n = 0
        self._costs = np.zeros((0, n_costs))
        self._first = np.zeros(0)  # step of the first report, inf without one
        self._final = np.zeros(0)  # NaN for a trial that is not complete
        self._scores: dict[int, Array] = {}  # by step, NaN without a report
        self._best: dict[int, Array] = {}  # by step, best score of others that cost no more
        self._n_further = n_further
        self._further: dict[int, Array] = {}  # by step, smaller is better, NaN without a report

    def __len__(self) -> int:
        return self._n

    @property
    def n_costs(self) -> int:
        """Number of costs of each trial."""
        return self._costs.shape[1]

    def add(self, number: int, costs: Sequence[float]) -> None:
        """Add the trial of the next number, or change a trial's costs; NaN counts as infinite."""
        row = np.nan_to_num(np.array(costs, dtype=float), nan=np.inf)
        if number >= len(self._first):
            self._grow(number + 1)
        if number >= self._n:
            self._n = number + 1
            self._costs[number] = row
        elif (self._costs[number] != row).any():
            self._costs[number] = row
            if np.isfinite(self._first[number]):
                for step, scores in self._scores.items():
                    self._best[step] = _best_of_cheaper(scores, self._paid(step))

    def _grow(self, n: int) -> None:
        extra = max(n, 64)
        self._costs = np.vstack([self._costs, np.zeros((extra, self._costs.shape[1]))])
        self._first = np.append(self._first, np.full(extra, np.inf))
        self._final = np.append(self._final, np.full(extra, np.nan))
        for table, fill in ((self._scores, np.nan), (self._best, -np.inf)):
            for step in table:
                table[step] = np.append(table[step], np.full(extra, fill))
        for step, rows in self._further.items():
            self._further[step] = np.vstack([rows, np.full((extra, self._n_further), np.nan)])

    def _paid(self, step: int) -> Array:
        """Return what each trial pays for its score at a step: costs, and further qualities.

        One that is not known is NaN, which is neither more nor less than any other.
        """
        if not self._n_further:
            return self._costs
        return np.column_stack([self._costs, self._further[step]])

    def report(self, number: int, step: int, score: float, further: Sequence[float] = ()) -> None:
        """Add a trial's score, larger is better; a second one at the same step is ignored.

        The further qualities are such that smaller is better; NaN: not known.
        """
        if step not in self._scores:
            self._scores[step] = np.full(len(self._first), np.nan)
            self._best[step] = np.full(len(self._first), -np.inf)
            self._further[step] = np.full((len(self._first), self._n_further), np.nan)
        scores, best = self._scores[step], self._best[step]
        if not np.isnan(scores[number]):
            return
        score = float(bounded(score)) if np.isfinite(score) else _WORST
        if self._n_further:
            self._further[step][number] = further
        paid = self._paid(step)
        costs_more = (paid >= paid[number]).all(axis=1)
        best[costs_more] = np.maximum(best[costs_more], score)
        is_cheaper = (paid <= paid[number]).all(axis=1) & ~np.isnan(scores)
        best[number] = scores[is_cheaper].max(initial=-np.inf)
        scores[number] = score
        self._first[number] = min(self._first[number], step)

    def end(self, number: int, quality: float) -> None:
        """Add a complete trial's final quality, larger is better."""
        self._final[number] = float(bounded(quality))

    def is_hopeless(self, number: int, last_step: float, n_deviations: float) -> bool:
        """Return whether a trial will probably end below one that costs no more.

        Its final quality is predicted from its score at its last rung up to `last_step`, which is
        what curves that cross make uncertain.

        Args:
            number: The trial; it has reported by `last_step`.
            last_step: Rungs after it are not read.
            n_deviations: Standard deviations of the prediction by which it must fall short.
        """
        steps = [s for s, scores in self._scores.items() if scores[number] > -np.inf]
        step = max(s for s in steps if s <= last_step)
        scores, paid = self._scores[step], self._paid(step)
        if scores[number] == _WORST:
            return True
        costs_no_more = (paid <= paid[number]).all(axis=1)
        to_beat = self._final[costs_no_more & ~np.isnan(self._final)].max(initial=-np.inf)
        known = ~np.isnan(self._final) & (scores > _WORST)
        if known.sum() < _FEWEST:
            return False
        line = Line.fit(scores[known], self._final[known])
        return bool(line.at(scores[number]) + n_deviations * line.deviation < to_beat)

    def gaps_at(self, step: int, numbers: NDArray[np.int64]) -> Array:
        """Return the gaps of trials that reported at a step, shape (len(numbers),)."""
        gaps: Array = self._best[step][numbers] - self._scores[step][numbers]
        return gaps

    def gap_to_stop(self, number: int, last_step: float, eta: float, min_peers: int) -> float:
        """Return the gap for which a trial should stop, or 0.0 if it should continue.

        Rungs after `last_step`, or with fewer trials than `min_peers`, never stop a trial.
        """
        steps = [s for s in sorted(self._scores, reverse=True) if self._scores[s][number] > -np.inf]
        if not steps or not self._is_beaten(number, steps):
            return 0.0
        for step in steps:
            if step > last_step:
                continue
            scores = self._scores[step][: self._n]
            others = np.flatnonzero(~np.isnan(scores))
            rows = np.append(number, others[others != number])
            if len(rows) < min_peers:
                continue
            scores, gaps = scores[rows], self.gaps_at(step, rows)
            n_started = int((self._first[: self._n] <= step).sum())
            is_first = step == self._first[number]
            if gaps[0] > 0 and not passes(scores, gaps, n_started, eta, is_first=is_first):
                return float(gaps[0])
        return 0.0

    def _is_beaten(self, number: int, steps: Sequence[int]) -> bool:
        """Return whether a trial that costs no more is better at the last rung both reached."""
        left = (self._costs <= self._costs[number]).all(axis=1)
        left[number] = False
        for step in steps:
            scores, paid = self._scores[step], self._paid(step)
            is_better = scores > scores[number]
            if (left & is_better & (paid <= paid[number]).all(axis=1)).any():
                return True
            left &= np.isnan(scores)
        return False


@dataclass(frozen=True)
class Line:
    """A line that predicts final qualities from scores at a rung.

    Attributes:
        score: Mean score.
        quality: Mean final quality.
        slope: At least 0: a better score never predicts a worse end.
        deviation: Standard deviation of what is left.
    """

    score: float
    quality: float
    slope: float
    deviation: float

    @classmethod
    def fit(cls, scores: Array, qualities: Array) -> Line:
        """Fit to three trials or more."""
        x, y = scores - scores.mean(), qualities - qualities.mean()
        slope = max(float(x @ y) / max(float(x @ x), 1e-300), 0.0)
        deviation = float(np.sqrt(((y - slope * x) ** 2).sum() / (len(x) - 2)))
        return cls(float(scores.mean()), float(qualities.mean()), slope, deviation)

    @overload
    def at(self, score: float) -> float: ...

    @overload
    def at(self, score: Array) -> Array: ...

    def at(self, score: float | Array) -> float | Array:
        """Return the expected final quality of a score, or of each."""
        return self.quality + self.slope * (score - self.score)


def last_stopping_step(n_steps: float) -> float:
    """Return the step after which no rung stops a training of that length."""
    return _EARLY * n_steps + 0.5


def passes(scores: Array, gaps: Array, n_started: int, eta: float, *, is_first: bool) -> bool:
    """Return whether the first of some trials at a rung passes it.

    Args:
        scores: Shape (n,), larger is better; of the trial itself, then of the others.
        gaps: Their gaps, shape (n,); see `GapPruner`.
        n_started: Number of trials that have reported at this rung or an earlier one.
        eta: Ratio between rungs.
        is_first: Whether this is the trial's first rung.
    """
    # Of many gaps an even sample is used.
    rows = np.unique(np.linspace(0, len(gaps) - 1, _MAX_GAPS).astype(int))
    compared = gaps[rows] if len(gaps) > _MAX_GAPS else gaps
    n_better = float((compared < gaps[0]).mean()) * len(gaps)
    few = n_started / eta**2
    if not is_first:
        return n_better < few + 1.0
    # Of no more than eta trials the second best is meaningless.
    n_top = max(few, 2.0) if n_started > eta else 0.0
    return n_better < n_started / eta or int((scores > scores[0]).sum()) < n_top


def _best_of_cheaper(scores: Array, costs: Array) -> Array:
    """Return the best score among the others that pay no more, from scratch; -inf without any."""
    best = np.full(len(scores), -np.inf)
    for number in np.flatnonzero(~np.isnan(scores)):
        costs_more = (costs >= costs[number]).all(axis=1)
        costs_more[number] = False
        best[costs_more] = np.maximum(best[costs_more], scores[number])
    return best
