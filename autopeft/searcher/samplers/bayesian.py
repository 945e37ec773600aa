"""The default proposer: quality is modeled, costs are known, the front's expected gain decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopeft.costs.constraints import Constraint
from autopeft.costs.objectives import Objective
from autopeft.searcher.samplers.base import Pricer, Seen, StratifiedSampler
from autopeft.searcher.samplers.cost_model import CostModel
from autopeft.searcher.samplers.ehvi import (
    BoxDecomposition,
    decompose,
    expected_hypervolume_improvement,
)
from autopeft.searcher.samplers.gp import Embedding, Features, GaussianProcess
from autopeft.searcher.samplers.observations import Observations, gather
from autopeft.searcher.samplers.warm_start import Prior
from autopeft.searcher.space.encoding import Point
from autopeft.searcher.space.space import SearchSpace
from autopeft.utils.pareto import non_dominated

Array = NDArray[np.float64]


@dataclass(frozen=True)
class BayesianOptions:
    """Options of `BayesianSampler`, tuned on the synthetic landscapes of `examples/benchmarks/`.

    Attributes:
        n_initial: Trials before the model takes over.
        n_mutations: Mutations of good points among the candidates.
        n_crossovers: Crossovers of good points among the candidates.
        n_random: Random points among the candidates, stratified by cost.
        n_rounds: Rounds of local search from the best candidates.
        spread_weight: Share of the model's standard deviation that counts. It is small, because the
            best of a thousand candidates is mostly the one that the model overestimates most.
        n_observations: Maximum number of trials that the model is fitted to.
        effort_power: The improvement is divided by the training effort to this power: 0 maximizes
            the improvement per trial, 1 the improvement per FLOP.
        overhead: Effort of a trial besides its steps (mostly evaluations), relative to training a
            small adapter at full depth.
    """

    n_initial: int = 14
    n_mutations: int = 160
    n_crossovers: int = 60
    n_random: int = 60
    n_rounds: int = 5
    spread_weight: float = 0.1
    n_observations: int = 300
    effort_power: float = 0.5
    overhead: float = 0.15


class BayesianSampler(StratifiedSampler):
    """Expected gain of hypervolume over mutations and crossovers of the front and fresh draws.

    Args:
        space: Where to draw.
        objectives: Quality first.
        pricer: Prices candidates.
        constraints: Limits to keep.
        seed: Of the random numbers.
        tuning: Sizes of pools.
        prior: What an earlier search found on other data.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        pricer: Pricer,
        constraints: Sequence[Constraint] = (),
        seed: int = 0,
        tuning: BayesianOptions | None = None,
        prior: Prior | None = None,
    ) -> None:
        super().__init__(space, objectives, pricer, constraints, seed)
        self.tuning = tuning or BayesianOptions()
        self.prior = prior or Prior()
        self.costs = CostModel(space, objectives, pricer)
        self._embedding = Embedding(space.grid, self.log_cost_range())
        self.surrogate = GaussianProcess(self._embedding)
        self._elsewhere = GaussianProcess(self._embedding)
        if len(self.prior):
            self._elsewhere.fit(self._features(self.prior.points), self.prior.qualities)

    def propose(self, history: Sequence[Seen]) -> Point:
        """The next point: a spread-out draw at first, then the one with the largest gain."""
        observations = self._fit(history)
        self.origin = "design" if observations is None else "search"
        if observations is None:
            return self._design(history)
        # The front as the surrogate sees it: a lucky score is no bar to beat.
        mean, _ = self.surrogate.predict(self._features(observations.points))
        costs = self._logs_of(observations)
        boxes = self._cells(history, observations, mean, costs)
        known = {s.point.key for s in history if s.point is not None}
        parents = self._parents(observations, mean, costs)
        best = self._best(boxes, self._pool(parents), known)
        return best if best is not None else super().propose(history)

    def propose_baseline(self, history: Sequence[Seen], choices: Sequence[Point]) -> Point:
        """The baseline that adds most to the baselines' own front: LoRA is tuned at every cost."""
        observations = self._fit(history)
        if observations is None:
            return choices[0]
        mean, _ = self.surrogate.predict(self._features(observations.points))
        costs = self._logs_of(observations)
        is_rival = [seen is not None and seen.origin == "baseline" for seen in observations.trials]
        if not any(is_rival):
            return choices[0]
        rivals = np.flatnonzero(is_rival)
        floor = float(mean.min())
        boxes = decompose(costs[rivals], mean[rivals], self.costs.worst, floor)
        expected, spread = self.surrogate.predict(self._features(choices))
        gains = expected_hypervolume_improvement(
            boxes, self.costs.fast(choices), expected, self.tuning.spread_weight * spread
        )
        return choices[int(np.argmax(gains))]

    # --- the surrogate and the front it sees -----------------------------------------------------

    def _fit(self, history: Sequence[Seen]) -> Observations | None:
        """Fit to what is known; None while that is too little."""
        n_told = sum(s.state in ("complete", "pruned") for s in history)
        n_complete = sum(s.state == "complete" and s.point is not None for s in history)
        # A prior stands in for half of the spread-out draws.
        n_initial = self.tuning.n_initial // (2 if len(self.prior) else 1)
        if n_complete < 4 or n_told < n_initial:
            return None
        sign = self.objectives[0].sign()
        observations = gather(history, sign, self.tuning.n_observations)
        self.costs.learn(history)
        observations = self._with_prior(observations)
        self.surrogate.fit(
            self._features(observations.points), observations.values, observations.noise
        )
        pending = [s.point for s in history if s.state == "running" and s.point is not None]
        if pending:
            # What is being trained counts as if it came out as expected, so that its
            # neighborhood loses its appeal until it does.
            mean, spread = self.surrogate.predict(self._features(pending))
            observations = observations.extended(pending, mean, spread)
            self.surrogate.fit(
                self._features(observations.points), observations.values, observations.noise
            )
        return observations

    def _with_prior(self, observations: Observations) -> Observations:
        """With the earlier search's trials, as far as they have foretold those of this one."""
        if not len(self.prior):
            return observations
        final = np.flatnonzero(observations.is_final)
        expected, _ = self._elsewhere.predict(
            self._features([observations.points[int(i)] for i in final])
        )
        values, noise = self.prior.translated(observations.values[final], expected)
        return observations.extended(self.prior.points, values, noise, is_final=False)

    def _cells(
        self, history: Sequence[Seen], observations: Observations, mean: Array, costs: Array
    ) -> BoxDecomposition:
        """The cost axes cut at the front's members."""
        counts = np.flatnonzero(observations.is_final)
        sign = self.objectives[0].sign()
        outside = [s for s in history if s.point is None and s.state == "complete"]
        if outside:
            mean = np.append(mean[counts], [sign * s.objectives[0] for s in outside])
            costs = np.vstack([costs[counts], [self.costs.of(s) for s in outside]])
        else:
            mean, costs = mean[counts], costs[counts]
        floor = float(observations.values[counts].min())
        for point, value in zip(observations.points, observations.values, strict=True):
            if not point.options.any():
                # Nothing that is worse than no adapter is worth its cost.
                floor = max(floor, float(value))
        keep = non_dominated(np.column_stack([mean, -costs]))
        worst = np.maximum(self.costs.worst, costs.max(axis=0, initial=-np.inf))
        return decompose(costs[keep], mean[keep], worst, floor)

    def _logs_of(self, observations: Observations) -> Array:
        logs = self.costs.fast(observations.points)
        for row, seen in enumerate(observations.trials):
            if seen is not None:
                logs[row] = self.costs.of(seen)
        return logs

    def _features(self, points: Sequence[Point]) -> Features:
        options = np.array([g.options for g in points])
        positions = np.array([g.position for g in points])
        return self._embedding.features(options, positions, self._log_params(points))

    def _log_params(self, points: Sequence[Point]) -> Array:
        if not points:
            return np.zeros(0)
        params = self.space.n_params(np.array([g.options for g in points]))
        logs: Array = np.log(np.maximum(params, 1.0))
        return logs

    # --- candidates ------------------------------------------------------------------------------

    def _parents(self, observations: Observations, mean: Array, costs: Array) -> list[Point]:
        """The front's members and those right behind it."""
        points = np.column_stack([mean, -costs])
        first = non_dominated(points)
        rest = np.flatnonzero(~first)
        second = rest[non_dominated(points[rest])] if len(rest) else rest
        return [observations.points[int(i)] for i in (*np.flatnonzero(first), *second)]

    def _pool(self, parents: Sequence[Point]) -> list[Point]:
        neighborhood, rng, tuning = self.space.neighborhood, self.rng, self.tuning
        # Plans of hundreds of sites take longer to judge: fewer of them.
        share = min(1.0, max(0.3, 128 / len(self.space.grid.units)))
        pool = []
        for _ in range(round(share * tuning.n_mutations)):
            point = parents[int(rng.integers(len(parents)))]
            for _ in range(1 + int(rng.random() < 0.4) + int(rng.random() < 0.2)):
                point = neighborhood.mutate(point, rng)
            pool.append(point)
        for _ in range(round(share * tuning.n_crossovers)):
            one, two = (int(i) for i in rng.integers(len(parents), size=2))
            pool.append(neighborhood.crossover(parents[one], parents[two], rng))
        low, high = self.log_cost_range()
        logs = rng.uniform(low, high, round(share * tuning.n_random))
        return pool + [self.space.point_sampler.at_cost(rng, log, 1) for log in logs]

    def _best(self, boxes: BoxDecomposition, pool: list[Point], known: set[Any]) -> Point | None:
        """The candidate of largest gain, after some rounds of improving the best ones."""
        taken = set(known)
        scored: list[tuple[float, Point]] = []
        for _ in range(self.tuning.n_rounds + 1):
            fresh = []
            for point in pool:
                if point.key not in taken:
                    taken.add(point.key)
                    fresh.append(point)
            if not fresh:
                break
            gains = self._gains(boxes, fresh, self.costs.fast(fresh))
            scored += zip(gains.tolist(), fresh, strict=True)
            scored = sorted(scored, key=lambda row: -row[0])[:12]
            leaders = [point for _, point in scored[:8]]
            pool = [self.space.neighborhood.mutate(g, self.rng) for g in leaders for _ in range(10)]
            for point in leaders[:2]:
                pool += self.space.neighborhood.other_rates(point)
        if not scored:
            return None
        leaders = [point for _, point in scored]
        if not self.costs.is_exact:
            gains = self._gains(boxes, leaders, self.costs.exact(leaders))
            leaders = [leaders[int(i)] for i in np.argsort(-gains)]
        return next((point for point in leaders if self.is_allowed(point)), None)

    def _gains(self, boxes: BoxDecomposition, points: Sequence[Point], logs: Array) -> Array:
        mean, spread = self.surrogate.predict(self._features(points))
        gains = expected_hypervolume_improvement(
            boxes, logs, mean, self.tuning.spread_weight * spread
        )
        if self.tuning.effort_power:
            effort = self.tuning.overhead + self.costs.effort(points)
            gains = gains / effort**self.tuning.effort_power
        params = self._log_params(points)
        # Beyond a limit on size there is nothing to gain.
        return np.where(params <= self.log_cost_range()[1] + 1e-9, gains, -1.0)

    def _design(self, history: Sequence[Seen]) -> Point:
        """A draw where the cost axis is emptiest, with methods seldom seen."""
        points = [s.point for s in history if s.point is not None]
        known = {point.key for point in points}
        low, high = self.log_cost_range()
        taken = np.append(np.clip(self._log_params(points), low, high), [low, high])
        draws = [
            self.space.point_sampler.at_cost(self.rng, self.rng.uniform(low, high))
            for _ in range(12)
        ]
        draws = [d for d in draws if d.key not in known and self.is_allowed(d)]
        if not draws:
            return super().propose(history)
        logs = self._log_params(draws)
        distance = np.abs(logs[:, None] - taken[None, :]).min(axis=1) / max(high - low, 1e-9)
        grid = self.space.grid
        used = np.zeros(len(grid.methods))
        for point in points:
            used[np.unique(grid.method_of[point.options[point.options > 0]])] += 1.0
        novelty = [
            np.mean(1.0 / (1.0 + used[np.unique(grid.method_of[d.options[d.options > 0]])]))
            for d in draws
        ]
        return draws[int(np.argmax(distance + 0.1 * np.array(novelty)))]
