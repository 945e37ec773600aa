"""GapPruner: stops what is far from the front, never what is on it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autopeft.errors import SettingsError, UserError
from autopeft.searcher.pruners.registry import Rungs
from autopeft.searcher.pruners.rung_table import RungTable, last_stopping_step
from autopeft.searcher.pruners.trial_costs import (
    CostFunction,
    TrialCosts,
    computed_price,
    counts_sites,
    stand_in,
)

PRICE_KEY = "price"
"""User attribute of a trial with its price: cost name -> number, or one number."""

TRAIN_KEY = "train"
"""User attribute of a trial with its training settings, among them "steps"."""

SITES_KEY = "n_sites"
"""User attribute of a trial with its number of adapters, in a search of autopeft."""

FURTHER_KEY = "further"
"""User attribute of a trial with its further qualities at rungs: step -> name -> number."""

_REMEDY = (
    'set them before it reports, trial.set_user_attr("price", {"seconds": 12.0}), '
    "or give GapPruner(costs=function of the parameters)"
)

_N_DEVIATIONS = 1.0
"""In a search. Measured: guides/measurements.md, pruning."""

_LOCK = threading.Lock()
"""Held while a table is read or changed: the trials of a study may run in several threads."""


@dataclass(frozen=True)
class _Seen:
    """What of a trial that has not ended may change what it costs or has reported."""

    state: TrialState
    n_values: int
    n_params: int
    price: Any

    @classmethod
    def of(cls, trial: FrozenTrial) -> _Seen:
        price = trial.user_attrs.get(PRICE_KEY)
        return cls(trial.state, len(trial.intermediate_values), len(trial.params), price)


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
    little and risk as much.

    With `n_deviations`, a rung must also tell enough: from the trials that are complete it predicts
    the trial's final quality by linear regression, and the trial goes on if so many standard
    deviations more would reach the best final quality among those that cost no more. With fewer
    than six complete trials, none is stopped. So a rung that tells little stops only what is
    hopeless.

    With further qualities, a trial is compared only with those that are no worse in any of them at
    the same step, either. So it is never stopped where it is not known to be dominated.

    With limits, a trial that is complete and breaks one stops no others: it is not on the front.

    It works in any Optuna study, of one or several objectives. Where there are several, Optuna's
    own `Trial.report` and `Trial.should_prune` refuse to work; `prunable` makes them.

    Args:
        eta: Ratio between rungs; of n trials about n / eta pass the first, n / eta**2 the second.
        costs: Names in the user attribute "price" of a trial, which it must have at its first
            report; or a function of the trial's parameters that returns its cost, or costs by name.
            None: the study's other objectives by their metric names, where known costs replace
            measured ones (FLOPs and the number of adapters the latency); all of the price if they
            have no names. With one objective, none.
        further: Metric names, among the study's other objectives, of further qualities: they are
            reported in the user attribute "further" of a trial, {step: {name: number}}.
        limits: Names of constraints of the trials, as `Trial.set_constraint` takes them; one is
            broken above 0.
        objective: Index of the objective that trials report, the quality. The others are minimized.
        n_steps: Steps of a whole training; None for the trial's user attribute "train", a mapping
            with "steps". Without either, every rung may stop a trial.
        n_warmup_steps: Reports before this step are not compared: right after the start, scores
            say little.
        min_peers: Minimum number of trials at a rung, itself included, before any is stopped.
        n_deviations: Standard deviations of the prediction by which a trial must fall short; None
            to trust every rung, also before any trial is complete. A search uses 1.

    Raises:
        UserError: when a trial reports that has no costs, or whose costs are no numbers.

    Example:
        >>> import optuna
        >>> pruner = autopeft.GapPruner(costs=lambda params: params["width"] ** 2, n_steps=30)
        >>> study = optuna.create_study(directions=["maximize", "minimize"], pruner=pruner)
        >>> @autopeft.prunable
        ... def objective(trial):
        ...     width = trial.suggest_int("width", 1, 9)
        ...     for step in range(30):
        ...         accuracy = 1.0 - 1.0 / (width + step)
        ...         trial.report(accuracy, step)
        ...         if trial.should_prune():
        ...             raise optuna.TrialPruned
        ...     return accuracy, width**2
        >>> study.optimize(objective, n_trials=5)
    """

    is_multi_objective = True

    def __init__(
        self,
        eta: float = 3.0,
        *,
        costs: str | Sequence[str] | CostFunction | None = None,
        further: Sequence[str] = (),
        limits: Sequence[str] = (),
        objective: int = 0,
        n_steps: int | None = None,
        n_warmup_steps: int = 0,
        min_peers: int = 2,
        n_deviations: float | None = None,
    ) -> None:
        if isinstance(eta, str) or not eta > 1:
            raise SettingsError("eta", eta, "`eta > 1` must hold", "use 3")
        if not (costs is None or callable(costs) or isinstance(costs, str | Sequence)):
            problem = "must be names, or a function of a trial's parameters"
            raise SettingsError("costs", costs, problem, "use e.g. ['seconds']")
        for name, number in (("n_warmup_steps", n_warmup_steps), ("min_peers", min_peers)):
            if number < 0:
                raise SettingsError(name, number, f"`{name} >= 0` must hold", "use 0 or more")
        if n_deviations is not None and not n_deviations >= 0:
            problem = "`n_deviations >= 0` must hold"
            raise SettingsError("n_deviations", n_deviations, problem, "use 1, or None")
        if n_steps is not None and not n_steps >= 1:
            raise SettingsError("n_steps", n_steps, "`n_steps >= 1` must hold", "use 1 or more")
        self._eta = float(eta)
        self._costs = (costs,) if isinstance(costs, str) else costs
        self._further = tuple(further)
        self._limits = tuple(limits)
        self._signs: tuple[float, ...] = ()
        self._objective = objective
        self._n_steps = n_steps
        self._n_warmup_steps = n_warmup_steps
        self._min_peers = min_peers
        self._n_deviations = n_deviations
        self._study: weakref.ref[optuna.study.Study] | None = None
        self._sign = 1.0
        self._reader = TrialCosts((), PRICE_KEY, _REMEDY)
        self._counts_sites = False
        self._table = RungTable(0)
        self._open: dict[int, _Seen] = {}

    def prune(self, study: optuna.study.Study, trial: FrozenTrial) -> bool:
        """Return whether the trial should stop; see the class."""
        return self.gap(study, trial) > 0

    def gap(
        self,
        study: optuna.study.Study,
        trial: FrozenTrial,
        changed: Iterable[FrozenTrial] | None = None,
    ) -> float:
        """Return the gap for which the trial should stop, in the score's unit; 0.0 to continue.

        Args:
            study: The study.
            trial: The trial that has reported.
            changed: All other trials that have reported or are complete since the last call of the
                study; None, always, to find them in the study, which takes longer the more trials
                it has.
        """
        last_step = last_stopping_step(self._steps_of(trial))
        with _LOCK:
            if self._study is None or self._study() is not study:
                self._start(study, trial)
                changed = None
            for each in self._changed(study, trial) if changed is None else (*changed, trial):
                self._read(each, trial)
            gap = self._table.gap_to_stop(trial.number, last_step, self._eta, self._min_peers)
            if gap > 0 and self._n_deviations is not None:
                if not self._table.is_hopeless(trial.number, last_step, self._n_deviations):
                    return 0.0
            return gap

    def _steps_of(self, trial: FrozenTrial) -> float:
        train = trial.user_attrs.get(TRAIN_KEY)
        own = train.get("steps") if isinstance(train, Mapping) else None
        return float(own or self._n_steps or np.inf)

    def _start(self, study: optuna.study.Study, trial: FrozenTrial) -> None:
        """Begin an empty table for a study, with the costs that this trial has."""
        directions = list(study.directions)
        if not 0 <= self._objective < len(directions):
            problem = f"the study has {len(directions)} objectives"
            raise UserError("objective", self._objective, problem, "give an index from 0")
        quality = directions.pop(self._objective)
        names = list(study.metric_names or ())
        found = {name: study.directions[names.index(name)] for name in self._further}
        self._signs = tuple(1.0 if d == StudyDirection.MINIMIZE else -1.0 for d in found.values())
        for direction in found.values():
            directions.remove(direction)
        for name, direction in zip(names, study.directions, strict=False):
            # A known cost, which is minimized, stands for a speed that is only measured.
            if direction == StudyDirection.MAXIMIZE and stand_in(name) != name:
                directions.remove(direction)
        if StudyDirection.MAXIMIZE in directions:
            shown = [each.name.lower() for each in study.directions]
            problem = f"beside objective {self._objective}, the reported one, all are minimized"
            remedy = "give GapPruner(objective=index of the quality that trials report)"
            raise UserError("directions", shown, problem, remedy)
        self._sign = 1.0 if quality == StudyDirection.MAXIMIZE else -1.0
        costs = self._cost_names(study)
        self._reader = TrialCosts(costs, PRICE_KEY, _REMEDY)
        self._counts_sites = SITES_KEY in trial.user_attrs and counts_sites(costs or ())
        self._table = RungTable(len(self._costs_of(trial)), len(self._further))
        self._open = {}
        self._study = weakref.ref(study)

    def _cost_names(self, study: optuna.study.Study) -> Sequence[str] | None:
        if callable(self._costs):
            return None
        if self._costs is not None or len(study.directions) == 1:
            return self._costs or ()
        names = study.metric_names
        return names and [
            name
            for i, name in enumerate(names)
            if i != self._objective and name not in self._further
        ]

    def _changed(self, study: optuna.study.Study, asking: FrozenTrial) -> Iterator[FrozenTrial]:
        """Yield the trials of a study that are new, or have changed since the last call."""
        trials = study.get_trials(deepcopy=False)
        for number in [*self._open, *range(len(self._table), len(trials))]:
            trial = trials[number]
            # A thousand trials may run at once, few of which have changed.
            now = _Seen.of(trial)
            if number != asking.number and self._open.get(number) == now:
                continue
            if trial.state.is_finished():
                self._open.pop(number, None)
            else:
                self._open[number] = now
            yield trial

    def _read(self, trial: FrozenTrial, asking: FrozenTrial) -> None:
        """Take a trial's costs, scores and end into the table."""
        number = trial.number
        self._table.add(number, self._known_costs(trial, is_asking=number == asking.number))
        if trial.state == TrialState.COMPLETE and self._breaks_limit(trial):
            self._table.exclude(number)
        for step, score in trial.intermediate_values.items():
            # A failed trial's early scores count: its plan did reach them.
            if step >= self._n_warmup_steps:
                further = self._further_of(trial, step)
                self._table.report(number, step, self._sign * score, further)
        if trial.state == TrialState.COMPLETE:
            self._table.end(number, self._sign * trial.values[self._objective])

    def _breaks_limit(self, trial: FrozenTrial) -> bool:
        if not self._limits:
            return False
        excess = trial.constraints
        return any(not excess.get(name, 0.0) <= 0.0 for name in self._limits)

    def _costs_of(self, trial: FrozenTrial) -> list[float]:
        price = trial.user_attrs.get(PRICE_KEY)
        if callable(self._costs):
            price = computed_price(self._costs, trial.number, trial.params)
        costs = self._reader.of(trial.number, price)
        if self._counts_sites:
            # FLOPs alone do not stand for latency: IA3 has none, but its calls take time.
            costs.append(float(trial.user_attrs.get(SITES_KEY, np.nan)))
        return costs

    def _further_of(self, trial: FrozenTrial, step: int) -> list[float]:
        """Return a trial's further qualities at a step, smaller is better; NaN: not known."""
        if not self._further:
            return []
        told = trial.user_attrs.get(FURTHER_KEY, {}).get(str(step), {})
        values = [float(told.get(name, np.nan)) for name in self._further]
        return [sign * value for sign, value in zip(self._signs, values, strict=True)]

    def _known_costs(self, trial: FrozenTrial, *, is_asking: bool) -> list[float]:
        try:
            return self._costs_of(trial)
        except UserError:
            if is_asking:
                raise
            # Not begun yet, or not of this script: it is no one's peer.
            return [np.nan] * self._table.n_costs

    def __getstate__(self) -> dict[str, Any]:
        """Leave the study behind: another process reads it itself."""
        return {**vars(self), "_study": None}


def gap_pruner(rungs: Rungs) -> GapPruner:
    """Return the pruner of a search that names "gap"."""
    return GapPruner(
        rungs.eta,
        costs=rungs.costs,
        further=rungs.further,
        limits=rungs.limits,
        n_deviations=_N_DEVIATIONS,
    )
