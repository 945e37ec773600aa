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
        self._costs = np.zeros((n_costs, 0))  # a row for each cost: they are compared one by one
        self._first = np.zeros(0)  # step of the first report, inf without one
        self._final = np.zeros(0)  # NaN for a trial that is not complete
        self._is_peer = np.zeros(0, dtype=bool)  # False for a trial that stops no others
        self._scores: dict[int, Array] = {}  # by step, NaN without a report
        self._best: dict[int, Array] = {}  # by step, best score of others that cost no more
        self._n_further = n_further
        self._further: dict[int, Array] = {}  # by step, as the costs, NaN without a report

    def __len__(self) -> int:
        return self._n

    @property
    def n_costs(self) -> int:
        """Number of costs of each trial."""
        return len(self._costs)

    def add(self, number: int, costs: Sequence[float]) -> None:
        """Add the trial of the next number, or change a trial's costs; NaN counts as infinite."""
        row = np.nan_to_num(np.array(costs, dtype=float), nan=np.inf)
        if number >= len(self._first):
            self._grow(number + 1)
        if number >= self._n:
            self._n = number + 1
            self._costs[:, number] = row
        elif (self._costs[:, number] != row).any():
            self._costs[:, number] = row
            if np.isfinite(self._first[number]):
                for step, scores in self._scores.items():
                    self._compare(step, np.flatnonzero(~np.isnan(scores[: self._n])))

    def exclude(self, number: int) -> None:
        """Let a trial stop no others from now on, because it cannot be on the front."""
        if not self._is_peer[number]:
            return
        self._is_peer[number] = False
        for step, scores in self._scores.items():
            # Only those whose best other it may have been have another one now.
            was_best = self._best[step][: self._n] == scores[number]
            was_best &= ~np.isnan(scores[: self._n])
            self._compare(step, np.flatnonzero(was_best))

    def _compare(self, step: int, numbers: NDArray[np.int64]) -> None:
        """Find the best score of the others that pay no more, for trials that reported at a step.

        It is -inf without any.
        """
        scores, paid = self._scores[step][: self._n], self._paid(step)
        is_other = self._is_peer[: self._n] & ~np.isnan(scores)
        for number in numbers.tolist():
            is_cheaper = _all_of(paid, np.less_equal, number) & is_other
            is_cheaper[number] = False
            self._best[step][number] = scores.max(initial=-np.inf, where=is_cheaper)

    def _grow(self, n: int) -> None:
        extra = max(n, 64)
        self._costs = np.hstack([self._costs, np.zeros((len(self._costs), extra))])
        self._first = np.append(self._first, np.full(extra, np.inf))
        self._final = np.append(self._final, np.full(extra, np.nan))
        self._is_peer = np.append(self._is_peer, np.ones(extra, dtype=bool))
        for table, fill in ((self._scores, np.nan), (self._best, -np.inf)):
            for step in table:
                table[step] = np.append(table[step], np.full(extra, fill))
        for step, rows in self._further.items():
            self._further[step] = np.hstack([rows, np.full((self._n_further, extra), np.nan)])

    def _paid(self, step: int) -> Array:
        """Return what each trial pays for its score at a step: costs, and further qualities.

        One that is not known is NaN, which is neither more nor less than any other. The shape is
        (n_costs + n_further, n).
        """
        costs = self._costs[:, : self._n]
        if not self._n_further:
            return costs
        return np.vstack([costs, self._further[step][:, : self._n]])

    def report(self, number: int, step: int, score: float, further: Sequence[float] = ()) -> None:
        """Add a trial's score, larger is better; a second one at the same step is ignored.

        The further qualities are such that smaller is better; NaN: not known.
        """
        if step not in self._scores:
            self._scores[step] = np.full(len(self._first), np.nan)
            self._best[step] = np.full(len(self._first), -np.inf)
            self._further[step] = np.full((self._n_further, len(self._first)), np.nan)
        scores, best = self._scores[step][: self._n], self._best[step][: self._n]
        if not np.isnan(scores[number]):
            return
        score = float(bounded(score)) if np.isfinite(score) else _WORST
        if self._n_further:
            self._further[step][:, number] = further
        scores[number] = score
        if self._is_peer[number]:
            costs_more = _all_of(self._paid(step), np.greater_equal, number)
            np.maximum(best, score, out=best, where=costs_more)
        self._compare(step, np.array([number]))
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
        scores, final = self._scores[step][: self._n], self._final[: self._n]
        if scores[number] == _WORST:
            return True
        is_complete = ~np.isnan(final)
        costs_no_more = _all_of(self._paid(step), np.less_equal, number)
        can_stop = costs_no_more & is_complete & self._is_peer[: self._n]
        to_beat = final.max(initial=-np.inf, where=can_stop)
        known = is_complete & (scores > _WORST)
        if known.sum() < _FEWEST:
            return False
        line = Line.fit(scores[known], final[known])
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
            reported = np.flatnonzero(~np.isnan(scores))
            if len(reported) < min_peers:
                continue
            gap = float(self._best[step][number] - scores[number])
            if not gap > 0:
                continue
            gaps = self.gaps_at(step, _sample(reported, number))
            n_better = float((gaps < gap).mean()) * len(reported)
            n_above = int(np.count_nonzero(scores > scores[number]))
            n_started = int(np.count_nonzero(self._first[: self._n] <= step))
            is_first = step == self._first[number]
            if not passes(n_better, n_above, n_started, eta, is_first=is_first):
                return gap
        return 0.0

    def _is_beaten(self, number: int, steps: Sequence[int]) -> bool:
        """Return whether a trial that costs no more is better at the last rung both reached."""
        left = _all_of(self._costs[:, : self._n], np.less_equal, number)
        left &= self._is_peer[: self._n]
        left[number] = False
        for step in steps:
            scores = self._scores[step][: self._n]
            is_better = scores > scores[number]
            if (left & is_better & _all_of(self._paid(step), np.less_equal, number)).any():
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


def passes(n_better: float, n_above: int, n_started: int, eta: float, *, is_first: bool) -> bool:
    """Return whether a trial passes a rung.

    Args:
        n_better: Number of trials at the rung with a smaller gap; see `GapPruner`.
        n_above: Number of them with a better score.
        n_started: Number of trials that have reported at this rung or an earlier one.
        eta: Ratio between rungs.
        is_first: Whether this is the trial's first rung.
    """
    few = n_started / eta**2
    if not is_first:
        return n_better < few + 1.0
    # Of no more than eta trials the second best is meaningless.
    n_top = max(few, 2.0) if n_started > eta else 0.0
    return n_better < n_started / eta or n_above < n_top


def _sample(reported: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Return a trial and the others that reported; of many, an even sample.

    Args:
        reported: Numbers of all that reported, sorted, this one among them.
        number: The trial.
    """
    place = int(np.searchsorted(reported, number))
    rows = np.arange(len(reported))
    if len(rows) > _MAX_GAPS:
        rows = np.unique(np.linspace(0, len(rows) - 1, _MAX_GAPS).astype(int))
    # The trial comes first, and those before it move back by one.
    rows = np.where(rows > place, rows, rows - 1)
    rows[0] = place
    return reported[rows]


def _all_of(paid: Array, compare: np.ufunc, number: int) -> NDArray[np.bool_]:
    """Return whether each trial compares to one in everything that is paid, shape (n,)."""
    found = np.ones(paid.shape[1], dtype=bool)
    for values in paid:
        found &= compare(values, values[number])
    return found
