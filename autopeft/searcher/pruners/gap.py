"""GapPruner: stops what is far from the front, never what is on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from autopeft.costs.objectives import COST_PROXIES
from autopeft.errors import SettingsError
from autopeft.searcher.pruners.registry import Rungs
from autopeft.searcher.pruners.rung_table import RungTable

_EARLY = 1.0 / 3.0
"""Share of a training in which rungs may stop it."""

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

    is_multi_objective = True

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


def gap_pruner(rungs: Rungs) -> GapPruner:
    """Return the pruner of a search that names "gap"."""
    return GapPruner(rungs.eta)
