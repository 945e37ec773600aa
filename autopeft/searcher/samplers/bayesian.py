"""The default sampler: models quality, knows costs, maximizes the expected hypervolume gain."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autopeft.searcher.samplers.base import StratifiedSampler
from autopeft.searcher.samplers.batch import Batch, Front, Scoring
from autopeft.searcher.samplers.cost_model import CostModel
from autopeft.searcher.samplers.ehvi import (
    Decomposition,
    decompose,
    expected_hypervolume_improvement,
)
from autopeft.searcher.samplers.further_qualities import FurtherQualities
from autopeft.searcher.samplers.gp import Earlier, Embedding, Features, GaussianProcess, log_params
from autopeft.searcher.samplers.limited_costs import LimitedCosts
from autopeft.searcher.samplers.observations import Observations
from autopeft.searcher.samplers.registry import Problem
from autopeft.searcher.samplers.success import SuccessModel
from autopeft.searcher.samplers.warm_start import WarmStart
from autopeft.searcher.space.encoding import Point
from autopeft.trial import Trial
from autopeft.utils.pareto import non_dominated

Array = NDArray[np.float64]


# Tuned on the synthetic landscapes of `examples/benchmarks/`.

N_INITIAL = 14
"""Trials before the model takes over."""

_N_WARM = 7
"""The same, where earlier searches are known."""

_TRUSTED = 0.7
"""Correlation with this search above which an earlier one replaces known recipes."""

_N_MUTATIONS, _N_CROSSOVERS, _N_RANDOM = 160, 60, 60
"""Candidates: mutations and crossovers of good points, and random points stratified by cost."""

_N_ROUNDS = 5
"""Rounds of local search from the best candidates."""

_SPREAD_WEIGHT = 0.1
"""Share of the model's standard deviation that counts. It is small, because the best of a thousand
candidates is mostly the one that the model overestimates most."""

_BASELINE_SPREAD_WEIGHT = 0.5
"""The same, for the best baseline: of a hundred, fewer are overestimated."""

_N_OBSERVATIONS = 300
"""Maximum number of trials that the model is fitted to."""

_N_PENDING = 128
"""Maximum number of running trials that the model is told of, the last ones started. Of a thousand
workers, most train what was proposed from an older model."""

_RUNNING_PER_ASK = 64
"""A model serves one proposal for each so many running trials: one more result of a thousand that
are to come changes little, and fitting takes most of an ask."""

_TOLD_PER_ASK = 256
"""The same for each so many trials that have ended, where many run: a model is fitted anew for
every 256th part of what is known."""

_N_BATCH = 128
"""Candidates from which the further proposals of a fit are taken, the best ones."""

_N_ENDED = 3000
"""The chance of success is learned from those that ended among so many trials, the last ones."""

_EFFORT_POWER = 0.5
"""The improvement is divided by the training effort to this power: 0 maximizes the improvement per
trial, 1 the improvement per FLOP."""

_OVERHEAD = 0.15
"""Effort of a trial besides its steps (mostly evaluations), relative to training a small adapter at
full depth."""


class BayesianSampler(StratifiedSampler):
    """Maximizes the expected hypervolume improvement over mutations, crossovers and random points.

    Args:
        problem: What to propose points for.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.warm_start = problem.warm_start or WarmStart()
        costs = [o for o in self.objectives[1:] if o.is_cost]
        self.costs = CostModel(self.space, [self.objectives[0], *costs], self.prices)
        self._embedding = Embedding(self.space.grid, self.log_cost_range())
        self.further = FurtherQualities(self.objectives, self.constraints, self._embedding)
        self.limited = LimitedCosts(self.space, self.constraints, self.prices)
        self.model = GaussianProcess(self._embedding)
        self.success = SuccessModel()
        self._observations: Observations | None = None
        self._n_changes = 0  # of trials, at the last fit
        self._learned_on = 0  # told trials, where the fits of many running ones learned weights
        self._batch: Batch | None = None
        self._earlier: Earlier | None = None
        if len(self.warm_start):
            known = self.warm_start
            features = self._features(known.points)
            self._earlier = Earlier(features, known.qualities, known.sources)

    def propose(self, trials: Sequence[Trial]) -> Point:
        """Return a point of the initial design, later the one with the largest improvement."""
        observations = self._fit(trials, N_INITIAL)
        self.origin = "design" if observations is None else "search"
        if observations is None:
            return self._design(trials)
        while self._batch is not None and (point := self._batch.next()) is not None:
            if point.key not in self.history.latest and self.is_allowed(point):
                return point
        # Use the model's means: a trial that was only lucky should not set the bar.
        mean, _ = self.model.predict(self._features(observations.points))
        costs = self._with_further(self._observed_costs(observations), observations.points)
        # What this fit has already proposed counts as if it had its expected quality.
        used = self._batch
        front = self._front(observations, mean, costs) if used is None else used.front
        parents = self._parents(observations, mean, costs)
        best, scored = self._maximize(front.cells, self._candidates(parents))
        if best is None:
            return super().propose(trials)
        if self._n_asks:
            self._batch = self._batch_of(front, best, scored)
        return best

    def propose_baseline(self, trials: Sequence[Trial], choices: Sequence[Point]) -> Point:
        """Return the baseline that may be the best one, or that improves the baselines' front.

        The two take turns: the tuned LoRA is judged by its quality alone.
        """
        observations = self._fit(trials, n_initial=0)
        if observations is None:
            return choices[0]
        mean, _ = self.model.predict(self._features(observations.points))
        costs = self._observed_costs(observations)
        is_baseline = [t is not None and t.origin == "baseline" for t in observations.trials]
        if not any(is_baseline):
            return choices[0]
        rows = np.flatnonzero(is_baseline)
        expected, spread = self.model.predict(self._features(choices))
        log_costs = self.costs.predict(choices)
        if sum(trial.origin == "baseline" for trial in trials) % 2 == 0:
            # Without costs, the improvement is that of the best quality.
            costs, log_costs = costs[:, :0], log_costs[:, :0]
            worst, weight = self.costs.worst[:0], _BASELINE_SPREAD_WEIGHT
        else:
            worst, weight = self.costs.worst, _SPREAD_WEIGHT
        boxes = decompose(costs[rows], mean[rows], worst, float(mean.min()))
        gains = expected_hypervolume_improvement(boxes, log_costs, expected, weight * spread)
        return choices[int(np.argmax(gains * self._chance(choices, self._features(choices))))]

    def is_guided(self, trials: Sequence[Trial]) -> bool:
        """Return whether an earlier search predicts this one's trials."""
        if self._earlier is None or self._fit(trials, _N_WARM) is None:
            return False
        return float(self.model.trust.max()) > _TRUSTED

    def _fit(self, trials: Sequence[Trial], n_initial: int) -> Observations | None:
        """Fit the models; return None while there are too few trials."""
        history = self.history
        history.update(trials)
        n_complete = len(history.complete)
        n_told = n_complete + len(history.outside) + history.n_pruned + len(history.failed)
        if self._earlier:
            n_initial = _N_WARM
        if n_complete < 4 or n_told < n_initial:
            if not self._n_asks:
                self._fit_success()
            return None
        n_changes = len(history.trials) + len(history.ended)
        n_asks = self._n_asks
        if n_asks:
            n_asks = max(n_asks, n_told // _TOLD_PER_ASK)
        # Each proposal is a trial that starts, and mostly one that ended.
        if self._observations is not None and n_changes - self._n_changes < 2 * n_asks:
            return self._observations
        self._n_changes = n_changes
        self._batch = None
        self._fit_success()
        self._observations = self._fit_all(n_told)
        return self._observations

    @property
    def _n_asks(self) -> int:
        """Proposals that one fit serves at least; 0 with few running trials: each has its own."""
        return len(self.history.running) // _RUNNING_PER_ASK

    def _fit_all(self, n_told: int) -> Observations:
        history = self.history
        observations = Observations.of(history, _N_OBSERVATIONS)
        self.costs.fit(history.trials)
        self.further.fit(history, self._features)
        self.limited.fit(history.trials)
        # Of many trials a selection is fitted, always of the same size.
        learns = n_told > 1.15 * self._learned_on if self._n_asks else None
        if learns:
            self._learned_on = n_told
        self._fit_model(observations, learns)
        if self._earlier:
            self.model.learn_trust()
        pending = [p for i in history.running if (p := history.points[i]) is not None]
        pending = pending[-_N_PENDING:]
        if pending:
            # Assume that running trials reach their expected quality, so that proposals keep away
            # from them.
            mean, spread = self.model.predict(self._features(pending))
            observations = observations.extended(pending, mean, spread)
            self._fit_model(observations, None if learns is None else False)
        return observations

    def _fit_success(self) -> None:
        history = self.history
        if history.failed:
            first = len(history.trials) - _N_ENDED
            succeeded, failed = (
                [i for part in parts for i in part[bisect_left(part, first) :]]
                for parts in ((history.complete, history.pruned), (history.failed,))
            )
            ended = [*succeeded, *failed]
            points = [p for i in ended if (p := history.points[i]) is not None]
            self.success.fit(self._features(points), np.arange(len(ended)) < len(succeeded))

    def _fit_model(self, observations: Observations, learns: bool | None) -> None:
        self.model.fit(
            self._features(observations.points),
            observations.values,
            observations.noise,
            self._earlier,
            learns=learns,
        )

    def _front(self, observations: Observations, mean: Array, costs: Array) -> Front:
        """Return the members of the front, and what a candidate must exceed."""
        is_broken = np.array([t is not None and bool(t.broken) for t in observations.trials])
        is_final = np.flatnonzero(observations.is_final & ~is_broken)
        mean, costs = mean[is_final], costs[is_final]
        history = self.history
        outside = [i for i in history.outside if not history.trials[i].broken]
        if outside:
            mean = np.append(mean, history.qualities()[outside])
            trials = [history.trials[i] for i in outside]
            logs = [np.append(self.costs.observed(t), self.further.observed(t)) for t in trials]
            costs = np.vstack([costs, logs])
        floor = float(observations.values[observations.is_final].min())
        for point, value in zip(observations.points, observations.values, strict=True):
            if not point.options.any():
                # A candidate that is worse than no adapter is not worth its cost.
                floor = max(floor, float(value))
        keep = non_dominated(np.column_stack([mean, -costs]))
        n_costs = len(self.costs.worst)
        largest = costs[:, :n_costs].max(axis=0, initial=-np.inf)
        worst = np.append(np.maximum(self.costs.worst, largest), self.further.worst)
        return Front(costs[keep], mean[keep], worst, floor)

    def _observed_costs(self, observations: Observations) -> Array:
        """Return log costs, shape (n, n_costs)."""
        logs = self.costs.predict(observations.points)
        for row, trial in enumerate(observations.trials):
            if trial is not None:
                logs[row] = self.costs.observed(trial)
        return logs

    def _with_further(self, costs: Array, points: Sequence[Point]) -> Array:
        """Return costs with the means of the further qualities as columns beside them."""
        return np.column_stack([costs, self.further.predict(self._features(points))[0]])

    def _chance(self, points: Sequence[Point], features: Features) -> Array:
        """Return the probability that a candidate trains and keeps all limits, shape (n,)."""
        kept = self.further.chance(features) * self.limited.chance(points)
        chance: Array = self.success.predict(features) * kept
        return chance

    def _features(self, points: Sequence[Point]) -> Features:
        return self._embedding.of(points, self.space)

    def _log_params(self, points: Sequence[Point]) -> Array:
        return log_params(points, self.space)

    def _parents(self, observations: Observations, mean: Array, costs: Array) -> list[Point]:
        """Return the points of the first two fronts."""
        points = observations.points
        if self._earlier:
            points = (*points, *self.warm_start.points)
            mean = np.append(mean, self.model.predict(self._earlier.features)[0])
            earlier = self.warm_start.points
            costs = np.vstack([costs, self._with_further(self.costs.predict(earlier), earlier)])
        oriented = np.column_stack([mean, -costs])
        first = non_dominated(oriented)
        rest = np.flatnonzero(~first)
        second = rest[non_dominated(oriented[rest])] if len(rest) else rest
        return [points[int(i)] for i in (*np.flatnonzero(first), *second)]

    def _candidates(self, parents: Sequence[Point]) -> list[Point]:
        """Return mutations and crossovers of the parents, and random points."""
        neighborhood, rng = self.space.neighborhood, self.rng
        # Fewer candidates in spaces with hundreds of units, where each takes longer to score.
        share = min(1.0, max(0.3, 128 / len(self.space.grid.units)))
        candidates = []
        for _ in range(round(share * _N_MUTATIONS)):
            point = parents[int(rng.integers(len(parents)))]
            for _ in range(1 + int(rng.random() < 0.4) + int(rng.random() < 0.2)):
                point = neighborhood.mutate(point, rng)
            candidates.append(point)
        for _ in range(round(share * _N_CROSSOVERS)):
            one, two = (int(i) for i in rng.integers(len(parents), size=2))
            candidates.append(neighborhood.crossover(parents[one], parents[two], rng))
        low, high = self.log_cost_range()
        logs = rng.uniform(low, high, round(share * _N_RANDOM))
        return candidates + [self.space.point_sampler.at_cost(rng, log, 1) for log in logs]

    def _maximize(
        self, boxes: Decomposition, candidates: list[Point]
    ) -> tuple[Point | None, list[tuple[float, Point]]]:
        """Return the new candidate of largest improvement after some rounds of local search.

        With it come all that were scored, with their improvements.
        """
        seen = set()
        scored: list[tuple[float, Point]] = []
        all_scored: list[tuple[float, Point]] = []
        for _ in range(_N_ROUNDS + 1):
            fresh = []
            for point in candidates:
                if point.key not in seen and point.key not in self.history.latest:
                    seen.add(point.key)
                    fresh.append(point)
            if not fresh:
                break
            gains = self._improvements(boxes, fresh, self.costs.predict(fresh))
            all_scored += zip(gains.tolist(), fresh, strict=True)
            scored += all_scored[-len(fresh) :]
            scored = sorted(scored, key=lambda row: -row[0])[:12]
            leaders = [point for _, point in scored[:8]]
            mutate = self.space.neighborhood.mutate
            candidates = [mutate(point, self.rng) for point in leaders for _ in range(10)]
            for point in leaders[:2]:
                candidates += self.space.neighborhood.other_rates(point)
        leaders = [point for _, point in scored]
        if leaders and not self.costs.is_exact:
            gains = self._improvements(boxes, leaders, self.costs.exact(leaders))
            leaders = [leaders[int(i)] for i in np.argsort(-gains)]
        best = next((point for point in leaders if self.is_allowed(point)), None)
        return best, all_scored

    def _batch_of(
        self, front: Front, first: Point, scored: list[tuple[float, Point]]
    ) -> Batch | None:
        """Return what is proposed after the first point, until the model is fitted anew."""
        best = sorted(scored, key=lambda row: -row[0])[:_N_BATCH]
        points = [first, *(point for _, point in best if point is not first)]
        return Batch(front, self._scoring(points, self.costs.predict(points)))

    def _improvements(
        self, boxes: Decomposition, points: Sequence[Point], log_costs: Array
    ) -> Array:
        """Return the expected improvement per effort, shape (n,); -1 above a limit on size."""
        return self._scoring(points, log_costs).improvements(boxes)

    def _scoring(self, points: Sequence[Point], log_costs: Array) -> Scoring:
        features = self._features(points)
        mean, spread = self.model.predict(features)
        further, deviation = self.further.predict(features)
        return Scoring(
            points,
            np.column_stack([log_costs, further]),
            _SPREAD_WEIGHT * np.column_stack([np.zeros_like(log_costs), deviation]),
            mean,
            _SPREAD_WEIGHT * spread,
            self._chance(points, features),
            (_OVERHEAD + self.costs.effort(points)) ** _EFFORT_POWER,
            self._log_params(points) <= self._log_cost_range[1] + 1e-9,
        )

    def _design(self, trials: Sequence[Trial]) -> Point:
        """Return a random point whose cost is far from the others', with rarely used methods."""
        if self._n_asks:
            return super().propose(trials)  # Among so many, one at random is as far from others.
        points = [point for point in self.history.points if point is not None]
        low, high = self.log_cost_range()
        taken = np.append(np.clip(self._log_params(points), low, high), [low, high])
        known = self.history.latest
        samples = [self.random_point() for _ in range(12)]
        samples = [p for p in samples if p.key not in known and self.is_allowed(p)]
        if not samples:
            return super().propose(trials)
        logs = self._log_params(samples)
        distance = np.abs(logs[:, None] - taken[None, :]).min(axis=1) / max(high - low, 1e-9)
        n_uses = np.zeros(len(self.space.grid.methods))
        for point in points:
            n_uses[self._methods_of(point)] += 1.0
        novelty = [np.mean(1.0 / (1.0 + n_uses[self._methods_of(p)])) for p in samples]
        chance = self.success.predict(self._features(samples))
        return samples[int(np.argmax((distance + 0.1 * np.array(novelty)) * chance))]

    def _methods_of(self, point: Point) -> NDArray[np.int64]:
        """Return the indices of the methods that a point uses."""
        return np.unique(self.space.grid.method_of[point.options[point.options > 0]])
