"""GapPruner, which keeps the front, and Optuna's pruners for studies with several directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autopeft.costs.objectives import COST_PROXIES
from autopeft.errors import SettingsError
from autopeft.utils.serialize import nearest

Array = NDArray[np.float64]

_EARLY = 1.0 / 3.0
"""Share of a training in which rungs may stop it."""

_MAX_GAPS = 512
"""Number of gaps that a trial is compared with at most."""

_WORST = -1e300
"""Replaces a score that is not finite, such that differences stay finite."""

PRICE_KEY = "price"
"""User attribute of a trial with its price: cost name -> number."""

TRAIN_KEY = "train"
"""User attribute of a trial with its training settings, among them "steps"."""


class GapPruner(BasePruner):
    """Stops a trial that is beaten by far by a trial that costs no more.

    At a rung, the *gap* of a trial is the best score among the other trials that cost no more, in
    every cost, minus its own score; it is minus infinity if there are none. Of n trials, those with
    the `n / eta` smallest gaps pass the first rung, and the `n / eta**2 + 1` smallest pass each
    later one. Others are stopped if their gap is positive. So the best trial for its cost continues
    even if more expensive trials are much better: it may be on the front. At the first rung, where
    scores predict least, the best `n / eta**2` trials by score pass too, so that the best quality
    is not lost to a cheap trial that learns fast.

    The shares are of all trials, not only of those that reached the rung. So the number that pass
    does not depend on how often trials report, and survivors, whose differences are mostly noise,
    are not reduced again at every report.

    Reports arrive in any order, so each report checks the earlier rungs again, where more peers may
    have arrived. A trial is never stopped if no trial that costs no more beats it at the last rung
    that both have reached. Rungs after a third of the training never stop a trial: that would save
    little and risk as much. (The length is read from the user attribute "train".)

    Works in studies with one or several directions. Scores follow the first direction. Costs are
    read from the user attribute "price".

    Args:
        eta: Ratio between rungs; of n trials about n / eta pass the first, n / eta**2 the second.
        costs: Names of the costs; None for the objectives after the first, where known costs
            replace measured ones.
        min_peers: Minimum number of trials at a rung, itself included, before any is stopped.

    Example:
        >>> topology = autopeft.Topology(2, {"attn.q": (64, 64), "attn.v": (64, 64)})
        >>> space = autopeft.SearchSpace.from_source({"methods": ["lora", "ia3"]}, topology)
        >>> pruner = autopeft.GapPruner(eta=3)
        >>> controller = autopeft.SearchController(space, ["accuracy"], pruner=pruner)
    """

    def __init__(
        self, eta: float = 3.0, *, costs: Sequence[str] | None = None, min_peers: int = 2
    ) -> None:
        if not eta > 1:
            raise SettingsError("eta", eta, "`eta > 1` must hold", "use 3")
        self._eta = float(eta)
        self._costs = None if costs is None else tuple(costs)
        self._min_peers = min_peers
        self._study_name = ""
        self._table = RungTable(0)
        self._open: list[int] = []

    def prune(self, study: optuna.study.Study, trial: FrozenTrial) -> bool:
        """Return whether the trial should stop; see the class."""
        return self.gap(study, trial) > 0

    def gap(self, study: optuna.study.Study, trial: FrozenTrial) -> float:
        """Return the gap for which the trial should stop, in the score's unit; 0.0 to continue."""
        self._update(study)
        last_step = _EARLY * float(trial.user_attrs.get(TRAIN_KEY, {}).get("steps", np.inf)) + 0.5
        return self._table.gap_to_stop(trial.number, last_step, self._eta, self._min_peers)

    def _update(self, study: optuna.study.Study) -> None:
        """Read the trials that are new or had not ended at the last call."""
        names = self._cost_names(study)
        if study.study_name != self._study_name:
            self._study_name = study.study_name
            self._table, self._open = RungTable(len(names)), []
        sign = 1.0 if study.directions[0] == StudyDirection.MAXIMIZE else -1.0
        trials = study.get_trials(deepcopy=False)
        changed = [*self._open, *range(len(self._table), len(trials))]
        self._open = [n for n in changed if not trials[n].state.is_finished()]
        for number in changed:
            stored = trials[number].user_attrs.get(PRICE_KEY, {})
            price = {**stored, **stored.get("others", {})}
            self._table.add(number, [float(price.get(name, np.nan)) for name in names])
            for step, score in trials[number].intermediate_values.items():
                # A failed trial's early scores count: its plan did reach them.
                self._table.report(number, step, sign * score)

    def _cost_names(self, study: optuna.study.Study) -> tuple[str, ...]:
        if self._costs is not None:
            return self._costs
        return tuple(COST_PROXIES.get(name, name) for name in (study.metric_names or [])[1:])


class RungTable:
    """Costs and scores of all trials, and each trial's gap at each rung, updated incrementally.

    Args:
        n_costs: Number of costs; 0 if all trials cost the same.
    """

    def __init__(self, n_costs: int) -> None:
        self._n = 0
        self._costs = np.zeros((0, n_costs))
        self._first = np.zeros(0)  # step of the first report, inf without one
        self._scores: dict[int, Array] = {}  # by step, NaN without a report
        self._best: dict[int, Array] = {}  # by step, best score of others that cost no more

    def __len__(self) -> int:
        return self._n

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
                    self._best[step] = _best_of_cheaper(scores, self._costs)

    def _grow(self, n: int) -> None:
        extra = max(n, 64)
        self._costs = np.vstack([self._costs, np.zeros((extra, self._costs.shape[1]))])
        self._first = np.append(self._first, np.full(extra, np.inf))
        for table, fill in ((self._scores, np.nan), (self._best, -np.inf)):
            for step in table:
                table[step] = np.append(table[step], np.full(extra, fill))

    def report(self, number: int, step: int, score: float) -> None:
        """Add a trial's score, larger is better; a second one at the same step is ignored."""
        if step not in self._scores:
            self._scores[step] = np.full(len(self._first), np.nan)
            self._best[step] = np.full(len(self._first), -np.inf)
        scores, best = self._scores[step], self._best[step]
        if not np.isnan(scores[number]):
            return
        score = score if np.isfinite(score) else _WORST
        mine = self._costs[number]
        costs_more = (self._costs >= mine).all(axis=1)
        best[costs_more] = np.maximum(best[costs_more], score)
        is_cheaper = (self._costs <= mine).all(axis=1) & ~np.isnan(scores)
        best[number] = scores[is_cheaper].max(initial=-np.inf)
        scores[number] = score
        self._first[number] = min(self._first[number], step)

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
            scores = self._scores[step]
            if (scores[left] > scores[number]).any():
                return True
            left &= np.isnan(scores)
        return False


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
    """Return the best score among the others that cost no more, from scratch; -inf without any."""
    best = np.full(len(scores), -np.inf)
    for number in np.flatnonzero(~np.isnan(scores)):
        costs_more = (costs >= costs[number]).all(axis=1)
        costs_more[number] = False
        best[costs_more] = np.maximum(best[costs_more], scores[number])
    return best


class SingleObjectivePruner(BasePruner):
    """Runs one of Optuna's pruners in a study with several directions.

    Optuna's pruners reject such studies, so they get a copy of it in memory with the first
    direction only. They ignore costs and stop cheap trials that belong on the front; they are here
    for comparison.
    """

    def __init__(self, inner: BasePruner) -> None:
        self._inner = inner
        self._copy: optuna.study.Study | None = None
        self._open: list[int] = []

    def prune(self, study: optuna.study.Study, trial: FrozenTrial) -> bool:
        """Return the inner pruner's decision."""
        copy = self._follow(study)
        return bool(self._inner.prune(copy, copy.get_trials(deepcopy=False)[trial.number]))

    def _follow(self, study: optuna.study.Study) -> optuna.study.Study:
        """Update and return the copy. Its trials have the same numbers."""
        if self._copy is None:
            self._copy = optuna.create_study(
                study_name=study.study_name, direction=study.directions[0], pruner=self._inner
            )
        trials = study.get_trials(deepcopy=False)
        n_known = len(self._copy.get_trials(deepcopy=False))
        changed = [*self._open, *range(n_known, len(trials))]
        self._open = [number for number in changed if not trials[number].state.is_finished()]
        for _ in range(n_known, len(trials)):
            self._copy.ask()
        known = self._copy.get_trials(deepcopy=False)
        for trial, copied in ((trials[number], known[number]) for number in changed):
            for step, value in sorted(trial.intermediate_values.items()):
                if step not in copied.intermediate_values:
                    optuna.trial.Trial(self._copy, copied._trial_id).report(value, step)
                    if trial.state.is_finished():
                        # A trial of an earlier session: some pruners keep state per rung.
                        copied = self._copy.get_trials(deepcopy=False)[trial.number]
                        self._inner.prune(self._copy, copied)
            if trial.state == TrialState.COMPLETE:
                self._copy.tell(trial.number, (trial.values or [float("nan")])[0])
            elif trial.state.is_finished():
                self._copy.tell(trial.number, state=trial.state)
        return self._copy


_OPTUNA: Mapping[str, Callable[[float, int, int], BasePruner]] = {
    "median": lambda eta, first, last: optuna.pruners.MedianPruner(),
    "percentile": lambda eta, first, last: optuna.pruners.PercentilePruner(100.0 / eta),
    "asha": lambda eta, first, last: optuna.pruners.SuccessiveHalvingPruner(
        min_resource=first, reduction_factor=max(2, round(eta))
    ),
    "hyperband": lambda eta, first, last: optuna.pruners.HyperbandPruner(
        min_resource=first, max_resource=last, reduction_factor=max(2, round(eta))
    ),
}
"""Name -> function of (ratio between rungs, steps at the first rung, steps at the last one)."""

PRUNERS: tuple[str, ...] = ("gap", "none", *_OPTUNA)
"""Names of pruners."""


def make_pruner(
    name: str | BasePruner, *, eta: float = 3.0, first_rung: int = 1, last_rung: int = 100
) -> BasePruner:
    """Return the pruner of that name; one of Optuna's is wrapped in `SingleObjectivePruner`.

    Args:
        name: "gap", "none", "median", "percentile", "asha", "hyperband", ...; or a pruner.
        eta: Ratio between rungs.
        first_rung: Steps at the first rung.
        last_rung: Steps of a whole training.

    Raises:
        SettingsError: if there is no such pruner.
    """
    if isinstance(name, BasePruner):
        return name if isinstance(name, GapPruner) else SingleObjectivePruner(name)
    if name == "gap":
        return GapPruner(eta)
    if name in ("none", "nop"):
        return optuna.pruners.NopPruner()
    name = "asha" if name == "sha" else name
    if name not in _OPTUNA:
        raise SettingsError("pruner", name, "no such pruner", nearest(str(name), PRUNERS))
    return SingleObjectivePruner(_OPTUNA[name](eta, max(1, first_rung), max(1, last_rung)))
