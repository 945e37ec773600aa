"""The rung rule that keeps the front, and Optuna's own pruners on a multi-objective study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autopeft.errors import SettingsError
from autopeft.searcher.samplers.base import COST_PROXIES
from autopeft.utils.serialize import nearest

_EARLY = 1.0 / 3.0
"""Share of a training in which rungs may stop it: a late stop saves little and risks as much."""

_MOST_GAPS = 512
"""Gaps computed at a rung at most; each looks at every peer."""

_WORST = -1e300
"""Stands in for a score that is no number; differences of it stay numbers."""

PRICE_KEY = "price"
"""User attribute of a trial that holds its price: cost name -> number."""

TRAIN_KEY = "train"
"""User attribute that holds its training settings, "steps" among them."""


@dataclass(frozen=True)
class _Peer:
    """What the rule needs of a trial: its costs and its scores (larger is better) by step."""

    costs: NDArray[np.float64]
    scores: Mapping[int, float]


class GapPruner(BasePruner):
    """Stops a trial that a peer beats which costs no more, if it is beaten by much.

    At a rung, a trial's *gap* is the best score among the peers that cost no more, in every cost,
    minus its own; without such a peer it is minus infinity. Of n trials, those with the `n / eta`
    smallest gaps pass the first rung, and the `n / eta**2 + 1` smallest every later one; the others
    stop if their gap is positive. So a trial that is the best for its cost goes on, however poor
    its quality is beside dearer ones: it may be on the front. At the first rung, where scores
    foretell least, the best `n / eta**2` by quality alone go on too, so that the best quality of
    all is not lost to a cheap trial that learns fast.

    The shares are of all trials, not of those that reached the rung: how many go on in the end does
    not depend on how often they report, and the few survivors, who differ by little more than
    chance, are not decimated again at every report.

    Reports arrive in any order, so each report looks again at the earlier rungs, where more peers
    may have arrived since. A trial that no peer costing no more beats at the last rung both have
    reached is never stopped. Rungs past a third of a training (where its length is known, from the
    user attribute "train") stop nothing: that would save little and risk as much.

    Works on studies with one or several directions; the score reported at rungs follows the first
    direction. Prices are read from the trials' user attribute "price".

    Args:
        eta: Ratio between rungs; of n trials about n / eta pass the first, n / eta**2 the second.
        costs: Names of the costs that count; None for the objectives after the first, costs only
            known after training being replaced by the priced cost that moves with them.
        min_peers: Trials, itself included, a rung needs before anything is stopped there.
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
        self._finished: dict[int, _Peer] = {}

    def prune(self, study: optuna.study.Study, trial: FrozenTrial) -> bool:
        """Whether the trial should stop; see the class."""
        return self.gap(study, trial) > 0

    def gap(self, study: optuna.study.Study, trial: FrozenTrial) -> float:
        """The gap for which the trial should stop; 0.0 if it should go on.

        The unit is the score's.
        """
        if study.study_name != self._study_name:
            self._study_name, self._finished = study.study_name, {}
        names = self._names(study)
        sign = 1.0 if study.directions[0] == StudyDirection.MAXIMIZE else -1.0
        me = _peer(trial, names, sign)
        if not me.scores:
            return 0.0
        others = self._others(study, trial.number, names, sign)
        cheaper = [peer for peer in others if (peer.costs <= me.costs).all()]
        if not any(_beats(peer, me) for peer in cheaper):
            return 0.0
        total = float(trial.user_attrs.get(TRAIN_KEY, {}).get("steps", np.inf))
        first = min(me.scores)
        for step in sorted(me.scores, reverse=True):
            if step > total * _EARLY + 0.5:
                continue
            gap = self._gap_at(step, me, others, is_first=step == first)
            if gap > 0:
                return gap
        return 0.0

    def _gap_at(self, step: int, me: _Peer, others: Sequence[_Peer], *, is_first: bool) -> float:
        """The gap at one rung if it is too large to pass there, else 0.0."""
        here = [me, *(peer for peer in others if step in peer.scores)]
        if len(here) < self._min_peers:
            return 0.0
        scores = np.array([peer.scores[step] for peer in here])
        costs = np.array([peer.costs for peer in here])
        # In a long search the other gaps are estimated from some of them, evenly spaced in time.
        rows = np.unique(np.linspace(0, len(here) - 1, _MOST_GAPS).astype(int))
        gaps = gaps_among(scores, costs, rows if len(here) > _MOST_GAPS else None)
        n_better = float((gaps < gaps[0]).mean()) * len(here)
        n_began = 1 + sum(min(peer.scores) <= step for peer in others)
        few = n_began / self._eta**2
        if is_first:
            # Of no more than eta trials a second best means nothing.
            n_top = max(few, 2.0) if n_began > self._eta else 0.0
            passes = n_better < n_began / self._eta or int((scores > scores[0]).sum()) < n_top
        else:
            passes = n_better < few + 1.0
        return 0.0 if passes else max(float(gaps[0]), 0.0)

    def _others(
        self, study: optuna.study.Study, number: int, names: Sequence[str], sign: float
    ) -> list[_Peer]:
        """All other trials that reported something."""
        others = []
        for other in study.get_trials(deepcopy=False):
            if other.number == number or not other.intermediate_values:
                continue
            # A failed trial's early scores are still what that plan reached by then.
            peer = self._finished.get(other.number)
            if peer is None:
                peer = _peer(other, names, sign)
                if other.state.is_finished():
                    self._finished[other.number] = peer
            others.append(peer)
        return others

    def _names(self, study: optuna.study.Study) -> tuple[str, ...]:
        if self._costs is not None:
            return self._costs
        return tuple(COST_PROXIES.get(name, name) for name in (study.metric_names or [])[1:])


def gaps_among(
    scores: NDArray[np.float64],
    costs: NDArray[np.float64],
    rows: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """Each trial's gap: the best score among the others that cost no more, minus its own.

    Args:
        scores: Shape (n,), larger is better.
        costs: Shape (n, k), smaller is better; k may be 0: then everyone costs the same.
        rows: The trials whose gaps are wanted; None for all.

    Returns:
        Shape (n,) or (len(rows),); -inf where no other trial costs no more in every cost.
    """
    rows = np.arange(len(scores)) if rows is None else rows
    # rows: the trial; columns: the peer
    is_peer = np.less_equal(costs[None, :, :], costs[rows, None, :]).all(axis=2)
    is_peer &= rows[:, None] != np.arange(len(scores))[None, :]
    best = np.where(is_peer, scores[None, :], -np.inf).max(axis=1, initial=-np.inf)
    result: NDArray[np.float64] = best - scores[rows]
    return result


def _peer(trial: FrozenTrial, names: Sequence[str], sign: float) -> _Peer:
    price = trial.user_attrs.get(PRICE_KEY, {})
    costs = np.array([float(price.get(name, np.nan)) for name in names])
    scores = {
        step: sign * value if np.isfinite(value) else _WORST
        for step, value in trial.intermediate_values.items()
    }
    return _Peer(np.nan_to_num(costs, nan=np.inf), scores)


def _beats(peer: _Peer, me: _Peer) -> bool:
    """Whether the peer is better at the last rung both have reached."""
    common = peer.scores.keys() & me.scores.keys()
    return bool(common) and peer.scores[max(common)] > me.scores[max(common)]


class SingleObjectivePruner(BasePruner):
    """One of Optuna's own pruners, on the quality curve of a study with several directions.

    Optuna's pruners refuse such studies, so they get to see a shadow of it: the same trials in
    memory, with the first direction alone. They know nothing of cost and stop cheap trials that
    belong on the front: they are here for comparison.

    Args:
        inner: The pruner.
    """

    def __init__(self, inner: BasePruner) -> None:
        self._inner = inner
        self._shadow: optuna.study.Study | None = None

    def prune(self, study: optuna.study.Study, trial: FrozenTrial) -> bool:
        """What the inner pruner says."""
        shadow = self._follow(study)
        return bool(self._inner.prune(shadow, shadow.get_trials(deepcopy=False)[trial.number]))

    def _follow(self, study: optuna.study.Study) -> optuna.study.Study:
        """The shadow, brought up to date. Its trials have the same numbers."""
        if self._shadow is None:
            self._shadow = optuna.create_study(
                study_name=study.study_name, direction=study.directions[0], pruner=self._inner
            )
        known = self._shadow.get_trials(deepcopy=False)
        for trial in study.get_trials(deepcopy=False):
            if trial.number >= len(known):
                self._shadow.ask()
                known = self._shadow.get_trials(deepcopy=False)
            twin = known[trial.number]
            if twin.state.is_finished():
                continue
            for step, value in sorted(trial.intermediate_values.items()):
                if step not in twin.intermediate_values:
                    optuna.trial.Trial(self._shadow, twin._trial_id).report(value, step)
                    if trial.state.is_finished():
                        # A trial of an earlier session: the pruner keeps notes of each rung.
                        twin = self._shadow.get_trials(deepcopy=False)[trial.number]
                        self._inner.prune(self._shadow, twin)
            if trial.state == TrialState.COMPLETE:
                self._shadow.tell(trial.number, (trial.values or [float("nan")])[0])
            elif trial.state.is_finished():
                self._shadow.tell(trial.number, state=trial.state)
        return self._shadow


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
"""Name -> maker from (ratio between rungs, steps at the first rung, steps at the last)."""

PRUNERS: tuple[str, ...] = ("gap", "none", *_OPTUNA)
"""Every pruner that has a name."""


def make_pruner(
    name: str | BasePruner, *, eta: float = 3.0, first_rung: int = 1, last_rung: int = 100
) -> BasePruner:
    """The pruner of that name, on the quality curve where it is one of Optuna's.

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
