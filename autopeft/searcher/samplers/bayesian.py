"""The default proposer: quality is modeled, costs are known, the front's expected gain decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopeft.costs.constraints import Constraint
from autopeft.costs.objectives import Objective
from autopeft.searcher.samplers.base import Pricer, Seen, StratifiedProposer
from autopeft.searcher.samplers.cost_model import CostModel
from autopeft.searcher.samplers.ehvi import Cells, cut, expected_gain
from autopeft.searcher.samplers.gp import Embedding, Points, Surrogate
from autopeft.searcher.samplers.observations import Evidence, gather
from autopeft.searcher.samplers.warm_start import Prior
from autopeft.searcher.space.encoding import Genome
from autopeft.searcher.space.space import SearchSpace
from autopeft.utils.pareto import non_dominated

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Tuning:
    """What the benchmark on synthetic landscapes settled.

    Attributes:
        n_start: Trials before the surrogate takes over.
        n_mutants: Mutations of good plans in the pool.
        n_children: Crossovers of good plans.
        n_draws: Fresh draws, spread over cost.
        n_rounds: Rounds of improving the best of the pool.
        optimizm: Share of the surrogate's standard deviation that counts. The best of a thousand
            candidates is mostly the one whose quality is most overrated, so little of it does.
        n_evidence: Trials the surrogate is fitted to at most.
        thrift: Power of a training's effort that its gain is divided by: 0 takes the largest gain
            of a trial, 1 the largest gain of a FLOP.
        overhead: What a trial takes besides its steps (evaluations, mostly), as a share of training
            a small adapter at full depth.
    """

    n_start: int = 14
    n_mutants: int = 160
    n_children: int = 60
    n_draws: int = 60
    n_rounds: int = 5
    optimizm: float = 0.1
    n_evidence: int = 300
    thrift: float = 0.5
    overhead: float = 0.15


class GainProposer(StratifiedProposer):
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
        tuning: Tuning | None = None,
        prior: Prior | None = None,
    ) -> None:
        super().__init__(space, objectives, pricer, constraints, seed)
        self.tuning = tuning or Tuning()
        self.prior = prior or Prior()
        self.costs = CostModel(space, objectives, pricer)
        self._embedding = Embedding(space.grid, self.log_cost_range())
        self.surrogate = Surrogate(self._embedding)
        self._elsewhere = Surrogate(self._embedding)
        if len(self.prior):
            self._elsewhere.fit(self._points(self.prior.genomes), self.prior.qualities)

    def propose(self, history: Sequence[Seen]) -> Genome:
        """The next point: a spread-out draw at first, then the one with the largest gain."""
        evidence = self._fit(history)
        self.origin = "design" if evidence is None else "search"
        if evidence is None:
            return self._design(history)
        # The front as the surrogate sees it: a lucky score is no bar to beat.
        mean, _ = self.surrogate.predict(self._points(evidence.genomes))
        costs = self._logs_of(evidence)
        cells = self._cells(history, evidence, mean, costs)
        known = {s.genome.key for s in history if s.genome is not None}
        parents = self._parents(evidence, mean, costs)
        best = self._best(cells, self._pool(parents), known)
        return best if best is not None else super().propose(history)

    def propose_baseline(self, history: Sequence[Seen], choices: Sequence[Genome]) -> Genome:
        """The baseline that adds most to the baselines' own front: LoRA is tuned at every cost."""
        evidence = self._fit(history)
        if evidence is None:
            return choices[0]
        mean, _ = self.surrogate.predict(self._points(evidence.genomes))
        costs = self._logs_of(evidence)
        is_rival = [seen is not None and seen.origin == "baseline" for seen in evidence.trials]
        if not any(is_rival):
            return choices[0]
        rivals = np.flatnonzero(is_rival)
        floor = float(mean.min())
        cells = cut(costs[rivals], mean[rivals], self.costs.worst, floor)
        expected, spread = self.surrogate.predict(self._points(choices))
        gains = expected_gain(
            cells, self.costs.fast(choices), expected, self.tuning.optimizm * spread
        )
        return choices[int(np.argmax(gains))]

    # --- the surrogate and the front it sees -----------------------------------------------------

    def _fit(self, history: Sequence[Seen]) -> Evidence | None:
        """Fit to what is known; None while that is too little."""
        n_told = sum(s.state in ("complete", "pruned") for s in history)
        n_complete = sum(s.state == "complete" and s.genome is not None for s in history)
        # A prior stands in for half of the spread-out draws.
        n_start = self.tuning.n_start // (2 if len(self.prior) else 1)
        if n_complete < 4 or n_told < n_start:
            return None
        sign = self.objectives[0].sign()
        evidence = gather(history, sign, self.tuning.n_evidence)
        self.costs.learn(history)
        evidence = self._with_prior(evidence)
        self.surrogate.fit(self._points(evidence.genomes), evidence.values, evidence.noise)
        pending = [s.genome for s in history if s.state == "running" and s.genome is not None]
        if pending:
            # What is being trained counts as if it came out as expected, so that its
            # neighborhood loses its appeal until it does.
            mean, spread = self.surrogate.predict(self._points(pending))
            evidence = evidence.extended(pending, mean, spread)
            self.surrogate.fit(self._points(evidence.genomes), evidence.values, evidence.noise)
        return evidence

    def _with_prior(self, evidence: Evidence) -> Evidence:
        """With the earlier search's trials, as far as they have foretold those of this one."""
        if not len(self.prior):
            return evidence
        final = np.flatnonzero(evidence.is_final)
        expected, _ = self._elsewhere.predict(
            self._points([evidence.genomes[int(i)] for i in final])
        )
        values, noise = self.prior.translated(evidence.values[final], expected)
        return evidence.extended(self.prior.genomes, values, noise, is_final=False)

    def _cells(
        self, history: Sequence[Seen], evidence: Evidence, mean: Array, costs: Array
    ) -> Cells:
        """The cost axes cut at the front's members."""
        counts = np.flatnonzero(evidence.is_final)
        sign = self.objectives[0].sign()
        outside = [s for s in history if s.genome is None and s.state == "complete"]
        if outside:
            mean = np.append(mean[counts], [sign * s.objectives[0] for s in outside])
            costs = np.vstack([costs[counts], [self.costs.of(s) for s in outside]])
        else:
            mean, costs = mean[counts], costs[counts]
        floor = float(evidence.values[counts].min())
        for genome, value in zip(evidence.genomes, evidence.values, strict=True):
            if not genome.options.any():
                # Nothing that is worse than no adapter is worth its cost.
                floor = max(floor, float(value))
        keep = non_dominated(np.column_stack([mean, -costs]))
        worst = np.maximum(self.costs.worst, costs.max(axis=0, initial=-np.inf))
        return cut(costs[keep], mean[keep], worst, floor)

    def _logs_of(self, evidence: Evidence) -> Array:
        logs = self.costs.fast(evidence.genomes)
        for row, seen in enumerate(evidence.trials):
            if seen is not None:
                logs[row] = self.costs.of(seen)
        return logs

    def _points(self, genomes: Sequence[Genome]) -> Points:
        options = np.array([g.options for g in genomes])
        positions = np.array([g.position for g in genomes])
        return self._embedding.points(options, positions, self._log_params(genomes))

    def _log_params(self, genomes: Sequence[Genome]) -> Array:
        if not genomes:
            return np.zeros(0)
        params = self.space.drawer.params(np.array([g.options for g in genomes]))
        logs: Array = np.log(np.maximum(params, 1.0))
        return logs

    # --- candidates ------------------------------------------------------------------------------

    def _parents(self, evidence: Evidence, mean: Array, costs: Array) -> list[Genome]:
        """The front's members and those right behind it."""
        points = np.column_stack([mean, -costs])
        first = non_dominated(points)
        rest = np.flatnonzero(~first)
        second = rest[non_dominated(points[rest])] if len(rest) else rest
        return [evidence.genomes[int(i)] for i in (*np.flatnonzero(first), *second)]

    def _pool(self, parents: Sequence[Genome]) -> list[Genome]:
        mover, rng, tuning = self.space.mover, self.rng, self.tuning
        # Plans of hundreds of sites take longer to judge: fewer of them.
        share = min(1.0, max(0.3, 128 / len(self.space.grid.units)))
        pool = []
        for _ in range(round(share * tuning.n_mutants)):
            genome = parents[int(rng.integers(len(parents)))]
            for _ in range(1 + int(rng.random() < 0.4) + int(rng.random() < 0.2)):
                genome = mover.mutate(genome, rng)
            pool.append(genome)
        for _ in range(round(share * tuning.n_children)):
            one, two = (int(i) for i in rng.integers(len(parents), size=2))
            pool.append(mover.crossover(parents[one], parents[two], rng))
        low, high = self.log_cost_range()
        logs = rng.uniform(low, high, round(share * tuning.n_draws))
        return pool + [self.space.drawer.at_cost(rng, log, 1) for log in logs]

    def _best(self, cells: Cells, pool: list[Genome], known: set[Any]) -> Genome | None:
        """The candidate of largest gain, after some rounds of improving the best ones."""
        taken = set(known)
        scored: list[tuple[float, Genome]] = []
        for _ in range(self.tuning.n_rounds + 1):
            fresh = []
            for genome in pool:
                if genome.key not in taken:
                    taken.add(genome.key)
                    fresh.append(genome)
            if not fresh:
                break
            gains = self._gains(cells, fresh, self.costs.fast(fresh))
            scored += zip(gains.tolist(), fresh, strict=True)
            scored = sorted(scored, key=lambda row: -row[0])[:12]
            leaders = [genome for _, genome in scored[:8]]
            pool = [self.space.mover.mutate(g, self.rng) for g in leaders for _ in range(10)]
            for genome in leaders[:2]:
                pool += self.space.mover.neighbors_in_rate(genome)
        if not scored:
            return None
        leaders = [genome for _, genome in scored]
        if not self.costs.is_exact:
            gains = self._gains(cells, leaders, self.costs.exact(leaders))
            leaders = [leaders[int(i)] for i in np.argsort(-gains)]
        return next((genome for genome in leaders if self.is_allowed(genome)), None)

    def _gains(self, cells: Cells, genomes: Sequence[Genome], logs: Array) -> Array:
        mean, spread = self.surrogate.predict(self._points(genomes))
        gains = expected_gain(cells, logs, mean, self.tuning.optimizm * spread)
        if self.tuning.thrift:
            effort = self.tuning.overhead + self.costs.effort(genomes)
            gains = gains / effort**self.tuning.thrift
        params = self._log_params(genomes)
        # Beyond a limit on size there is nothing to gain.
        return np.where(params <= self.log_cost_range()[1] + 1e-9, gains, -1.0)

    def _design(self, history: Sequence[Seen]) -> Genome:
        """A draw where the cost axis is emptiest, with methods seldom seen."""
        genomes = [s.genome for s in history if s.genome is not None]
        known = {genome.key for genome in genomes}
        low, high = self.log_cost_range()
        taken = np.append(np.clip(self._log_params(genomes), low, high), [low, high])
        draws = [
            self.space.drawer.at_cost(self.rng, self.rng.uniform(low, high)) for _ in range(12)
        ]
        draws = [d for d in draws if d.key not in known and self.is_allowed(d)]
        if not draws:
            return super().propose(history)
        logs = self._log_params(draws)
        distance = np.abs(logs[:, None] - taken[None, :]).min(axis=1) / max(high - low, 1e-9)
        grid = self.space.grid
        used = np.zeros(len(grid.methods))
        for genome in genomes:
            used[np.unique(grid.method_of[genome.options[genome.options > 0]])] += 1.0
        novelty = [
            np.mean(1.0 / (1.0 + used[np.unique(grid.method_of[d.options[d.options > 0]])]))
            for d in draws
        ]
        return draws[int(np.argmax(distance + 0.1 * np.array(novelty)))]
