"""The chance that a candidate keeps the limits on costs that are only measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from autopeft.costs.constraints import Constraint
from autopeft.costs.objectives import Objective, Pricer
from autopeft.searcher.samplers.cost_model import CostModel
from autopeft.searcher.space.encoding import Point
from autopeft.searcher.space.space import SearchSpace
from autopeft.trial import Trial

Array = NDArray[np.float64]

_FEWEST = 4
"""Complete trials that a model needs."""

_MOST = 300
"""Complete trials that tell how far the model is off, the last ones."""

_PRIOR_SPREAD, _PRIOR_WEIGHT = 0.1, 4.0
"""How far a prediction is off before trials have told it, in natural logarithms, and the number of
trials that this counts for: a model with a factor for each method fits the first few exactly."""


class LimitedCosts:
    """Predicts the measured costs that have limits, whether they are objectives or not.

    The logarithm of a cost is taken to be normal about the prediction of `CostModel`, with the
    deviation that complete trials have from it.

    Args:
        space: The search space.
        constraints: Limits; those on known costs and qualities are passed over.
        pricer: Prices candidates.
    """

    def __init__(
        self, space: SearchSpace, constraints: Sequence[Constraint], pricer: Pricer
    ) -> None:
        limits = [(limit, cost) for limit in constraints if (cost := limit.measured_cost)]
        self._names = list(dict.fromkeys(limit.name for limit, _ in limits))
        # A speed is modeled by its inverse, of which less is better, as of a cost.
        self._bounds = [
            (self._names.index(limit.name), float(np.log(cost.amount(limit.limit))))
            for limit, cost in limits
        ]
        self._model: CostModel | None = None
        if limits:
            costs = {limit.name: cost for limit, cost in limits}
            # The first objective is passed over there: it is the quality.
            self._model = CostModel(space, [Objective("", "maximize"), *costs.values()], pricer)
        self._n_factors = 2 + len(space.grid.methods)
        self._spread: Array | None = None

    def fit(self, trials: Sequence[Trial]) -> None:
        """Fit to the complete trials that tell the costs."""
        if self._model is None:
            return
        told = [t for t in trials if t.state == "complete" and self._is_told(t)]
        if len(told) < _FEWEST:
            return
        self._model.fit(told)
        errors = np.array([self._error(self._model, trial) for trial in told[-_MOST:]])
        freedom = max(len(errors) - self._n_factors, 0) + _PRIOR_WEIGHT
        total = (errors**2).sum(axis=0) + _PRIOR_WEIGHT * _PRIOR_SPREAD**2
        self._spread = np.sqrt(total / freedom)

    def chance(self, points: Sequence[Point]) -> Array:
        """Return the probability that all limits are kept, shape (n,); 1 before the first fit."""
        chance = np.ones(len(points))
        if self._model is None or self._spread is None:
            return chance
        logs = self._model.predict(points)
        for column, bound in self._bounds:
            chance *= ndtr((bound - logs[:, column]) / self._spread[column])
        return chance

    def _is_told(self, trial: Trial) -> bool:
        return all(name in trial.values or name in trial.measured for name in self._names)

    @staticmethod
    def _error(model: CostModel, trial: Trial) -> Array:
        """Return the log of what was measured over what is predicted, shape (n_costs,)."""
        # What has not ended is predicted, in the space or not.
        error: Array = model.observed(trial) - model.observed(replace(trial, state="running"))
        return error
