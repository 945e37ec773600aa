"""Log costs of many points at once: exact where costs are sums, else an approximation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from autopeft.costs.objectives import COSTS, Cost, Objective, Pricer, proxy_of
from autopeft.searcher.samplers.measured_cost import MeasuredCost
from autopeft.searcher.space.encoding import Point
from autopeft.searcher.space.space import SearchSpace
from autopeft.trial import Trial
from autopeft.utils.extremes import LARGEST

Array = NDArray[np.float64]

_N_PROBES = 6

_MOST = 1000
"""Complete trials that a measured cost is fitted to."""

_LEAST = 1e-9
"""A smaller cost counts as this much: costs are compared by their logarithms."""


class CostModel:
    """Predicts the natural logarithms of all cost objectives.

    A cost is modeled as a sum over units, plus a term for the depth of the lowest adapted unit.
    That is exact for trainable parameters and bytes. A cost that is only measured is predicted from
    a known cost, see `Cost.proxy`, and from the number of sites by method.

    Args:
        space: The search space.
        objectives: Quality first; the rest are costs, no further qualities.
        pricer: Prices candidates.
    """

    def __init__(self, space: SearchSpace, objectives: Sequence[Objective], pricer: Pricer) -> None:
        self._space = space
        self._pricer = pricer
        self._costs = tuple(objectives[1:])
        self._known = [proxy_of(cost.name) for cost in self._costs]
        self._measured: dict[int, MeasuredCost] = {}  # by index of the cost
        self._tables: dict[str, tuple[Array, Array, float]] = {}
        self._ratios = {name: self._ratio(name) for name in dict.fromkeys(self._known)}

    @property
    def is_exact(self) -> bool:
        """Whether `predict` is exact for every cost."""
        known = all(cost.is_known for cost in self._costs)
        return known and all(ratio is not None for ratio in self._ratios.values())

    def fit(self, trials: Sequence[Trial]) -> None:
        """Fit the costs that are only measured to the complete trials, the last `_MOST`."""
        if all(cost.is_known for cost in self._costs):
            return
        last = islice((t for t in reversed(trials) if t.state == "complete"), _MOST)
        complete = list(last)[::-1]
        if len(complete) < 3:
            return
        sites = np.array([self._sites_of(trial) for trial in complete])
        for k, cost in enumerate(self._costs):
            if cost.is_known:
                continue
            known = np.array([trial.costs.value(self._known[k]) for trial in complete])
            measured = np.array([_amount(cost, trial) for trial in complete])
            self._measured[k] = MeasuredCost.fit(known, sites, np.clip(measured, _LEAST, LARGEST))
            self.__dict__.pop("worst", None)

    def predict(self, points: Sequence[Point]) -> Array:
        """Return log costs, shape (n, n_costs)."""
        options = np.array([point.options for point in points])
        return self._logs([self._values(name, options) for name in self._known], options)

    def effort(self, points: Sequence[Point]) -> Array:
        """Return training FLOPs relative to a small adapter at full depth, shape (n,)."""
        options = np.array([point.options for point in points])
        full_depth = float(self._table("train_flops")[0][0])
        return self._summed("train_flops", options) / max(full_depth, 1e-9)

    def exact(self, points: Sequence[Point]) -> Array:
        """Return log costs from the pricer, which is slower; shape (n, n_costs)."""
        prices = [self._pricer.price(self._space.encoder.to_candidate(p)) for p in points]
        values = [np.array([p.value(name) for p in prices]) for name in self._known]
        return self._logs(values, np.array([point.options for point in points]))

    def observed(self, trial: Trial) -> Array:
        """Return the log costs of a trial, measured ones if it is complete; shape (n_costs,)."""
        values = [np.array([trial.costs.value(name)]) for name in self._known]
        logs: Array = self._with_sites(values, self._sites_of(trial)[None])[0]
        if trial.state == "complete":
            measured = _log(np.array([_amount(cost, trial) for cost in self._costs]))
            logs = np.where(np.isfinite(measured), measured, logs)
        return logs

    @cached_property
    def worst(self) -> Array:
        """Log costs of the plan with the most parameters, shape (n_costs,)."""
        grid = self._space.grid
        largest = np.where(grid.legal, grid.params, -1.0).argmax(axis=1)
        values: Array = self.exact([Point(largest)])[0]
        return values

    def _logs(self, values: Sequence[Array], options: NDArray[np.int64]) -> Array:
        """Return log costs of options whose known costs are given, shape (n, n_costs)."""
        units = np.arange(options.shape[-1])
        sites = self._n_sites[units, options].sum(axis=1) if self._measured else np.zeros((0, 0))
        return self._with_sites(values, sites) if values else np.zeros((len(options), 0))

    def _with_sites(self, values: Sequence[Array], sites: Array) -> Array:
        models = self._measured
        columns = [
            models[k].predict(known, sites) if k in models else known
            for k, known in enumerate(values)
        ]
        return _log(np.stack(columns, axis=1)) if columns else np.zeros((1, 0))

    @cached_property
    def _n_sites(self) -> Array:
        """Number of sites by unit, option and method, shape (n_units, n_options, n_methods)."""
        grid = self._space.grid
        counts = np.zeros((*grid.legal.shape, len(grid.methods)))
        for (unit, option), specs in grid.sites.items():
            counts[unit, option, grid.method_of[option]] = len(specs)
        return counts

    def _sites_of(self, trial: Trial) -> Array:
        """Return the number of sites by method of a trial, in the space or not."""
        used = [spec.method for spec in trial.plan.specs]
        return np.array([float(used.count(name)) for name in self._space.grid.methods])

    def _values(self, name: str, options: NDArray[np.int64]) -> Array:
        ratio = self._ratios[name]
        if ratio is None:
            return self._summed(name, options)
        return ratio * self._space.n_params(options)

    def _summed(self, name: str, options: NDArray[np.int64]) -> Array:
        depths, extras, empty = self._table(name)
        rows = np.arange(options.shape[1])
        adapted = options > 0
        lowest = adapted.argmax(axis=1)
        total = extras[rows, options].sum(axis=1) + depths[lowest]
        values: Array = np.where(adapted.any(axis=1), total, empty)
        return values

    def _ratio(self, name: str) -> float | None:
        """Return the ratio of a cost to trainable parameters, or None if it is not constant."""
        rng = np.random.default_rng(0)
        probes = [self._space.point_sampler.stratified(rng) for _ in range(_N_PROBES)]
        params = self._space.n_params(np.array([g.options for g in probes]))
        prices = [self._pricer.price(self._space.encoder.to_candidate(g)) for g in probes]
        ratios = np.array([p.value(name) for p in prices]) / np.maximum(params, 1.0)
        return float(ratios[0]) if np.ptp(ratios) <= 1e-9 * abs(ratios[0]) else None

    def _table(self, name: str) -> tuple[Array, Array, float]:
        """Return (cost by lowest adapted unit, cost by unit and option, cost of no adapter)."""
        if name in self._tables:
            return self._tables[name]
        grid = self._space.grid
        n_units, n_options = grid.params.shape

        def cost(choices: dict[int, int]) -> float:
            options = np.zeros(n_units, dtype=np.int64)
            for unit, option in choices.items():
                options[unit] = option
            candidate = self._space.encoder.to_candidate(Point(options))
            return self._pricer.price(candidate).value(name)

        # A registered cost may depend on the site.
        is_own = name in COSTS and COSTS[name].function is not None
        cheapest = np.where(grid.legal, grid.params, np.inf)[:, 1:].argmin(axis=1) + 1
        extras = np.zeros((n_units, n_options))
        known: dict[bytes, Array] = {}
        for unit in range(n_units):
            # Units whose options have equal parameters have equal costs.
            key = grid.params[unit].tobytes()
            if key in known and not is_own:
                extras[unit] = known[key]
                continue
            # Measured above another adapted unit, so that depth does not matter.
            below = {0: int(cheapest[0])} if unit else {}
            floor = cost(below) if below else 0.0
            for option in np.flatnonzero(grid.legal[unit])[1:]:
                extras[unit, option] = cost({**below, unit: int(option)}) - floor
            if unit or n_units == 1:
                known[key] = extras[unit]
        if n_units > 1:
            same = None if is_own else known.get(grid.params[0].tobytes())
            extras[0] = same if same is not None else extras[0] - extras[0][cheapest[0]]
        depths = np.array(
            [cost({u: int(cheapest[u])}) - extras[u, cheapest[u]] for u in range(n_units)]
        )
        self._tables[name] = depths, extras, cost({})
        return self._tables[name]


def _amount(cost: Objective, trial: Trial) -> float:
    """Return a complete trial's cost, of which less is better: of a speed, the inverse."""
    value = trial.value(cost.name)
    if not isinstance(cost, Cost) or cost.direction == "minimize":
        return value
    return float(cost.amount(max(value, _LEAST)))


def _log(values: Array) -> Array:
    logs: Array = np.log(np.clip(values, _LEAST, LARGEST))
    return logs
