"""Which point to try next: the brain of the sampler, in plain numbers, knowing no Optuna."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from autopeft.outcome import Objective
from autopeft.plan import Candidate
from autopeft.pricing import Price
from autopeft.search.acquisition import cut, expected_gain
from autopeft.search.constraints import Constraint
from autopeft.search.front import non_dominated
from autopeft.search.genome import Genome
from autopeft.search.space import SearchSpace
from autopeft.search.surrogate import Embedding, Points, Surrogate


class Pricer(Protocol):
    """Whatever prices a candidate; `PriceTable` does."""

    def price(self, candidate: Candidate) -> Price:
        """What it costs."""


@dataclass(frozen=True)
class Seen:
    """One earlier trial.

    Attributes:
        genome: What was tried; None if it is no point of the space.
        state: How it stands.
        objectives: Values in the objectives' own directions; NaN where unknown.
        price: Its price.
        rungs: Step -> score, in the quality's direction.
    """

    genome: Genome | None
    state: Literal["complete", "pruned", "failed", "running"]
    objectives: tuple[float, ...]
    price: Mapping[str, float]
    rungs: Mapping[int, float] = field(default_factory=dict)


class StratifiedProposer:
    """Random draws, spread over cost on a log scale.

    Args:
        space: Where to draw.
        objectives: Quality first.
        pricer: Prices candidates.
        constraints: Limits to keep.
        seed: Of the random numbers.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        pricer: Pricer,
        constraints: Sequence[Constraint] = (),
        seed: int = 0,
    ) -> None:
        self.space = space
        self.objectives = tuple(objectives)
        self.pricer = pricer
        self.constraints = tuple(constraints)
        self.rng = np.random.default_rng(seed)

    def propose(self, history: Sequence[Seen]) -> Genome:
        """The next point; not one of the history's, as far as drawing finds another."""
        known = {seen.genome.key for seen in history if seen.genome is not None}
        low, high = self.log_cost_range()
        genome = self.space.drawer.at_cost(self.rng, self.rng.uniform(low, high))
        for _ in range(50):
            if genome.key not in known:
                break
            genome = self.space.drawer.at_cost(self.rng, self.rng.uniform(low, high))
        return genome

    def log_cost_range(self) -> tuple[float, float]:
        """Of trainable parameters, as far as the constraints allow."""
        low, high = self.space.cost_range()
        for limit in self.constraints:
            if limit.name == "trainable_params":
                high = min(high, limit.limit)
            elif limit.name == "adapter_bytes":
                high = min(high, limit.limit / 4)
        return float(np.log(max(low, 1.0))), float(np.log(max(high, low, 1.0)))


@dataclass(frozen=True)
class Tuning:
    """What the proposer's benchmark settled.

    Attributes:
        n_start: Trials before the surrogate takes over.
        n_mutants: Mutations of good plans in the pool.
        n_children: Crossovers of good plans.
        n_draws: Fresh draws, spread over cost.
        n_rounds: Rounds of improving the best of the pool.
    """

    n_start: int = 18
    n_mutants: int = 200
    n_children: int = 80
    n_draws: int = 100
    n_rounds: int = 3


class GainProposer(StratifiedProposer):
    """Expected gain of hypervolume: quality modelled, costs known.

    Args:
        space: Where to draw.
        objectives: Quality first.
        pricer: Prices candidates.
        constraints: Limits to keep.
        seed: Of the random numbers.
        tuning: Sizes of pools.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        pricer: Pricer,
        constraints: Sequence[Constraint] = (),
        seed: int = 0,
        tuning: Tuning | None = None,
    ) -> None:
        super().__init__(space, objectives, pricer, constraints, seed)
        self.tuning = tuning or Tuning()
        low, high = self.log_cost_range()
        self._embedding = Embedding(space.grid, (low, high))
        self.surrogate = Surrogate(self._embedding)

    def propose(self, history: Sequence[Seen]) -> Genome:
        """The next point."""
        usable = [s for s in history if s.genome is not None]
        known = {s.genome.key for s in usable if s.genome is not None}
        complete = [s for s in usable if s.state == "complete"]
        if len(usable) < self.tuning.n_start or len(complete) < 4:
            return self._design(usable, known)
        sign = self.objectives[0].sign()
        genomes = [s.genome for s in complete if s.genome is not None]
        values = np.array([sign * s.objectives[0] for s in complete])
        points = self._points(genomes)
        self.surrogate.fit(points, values)
        mean, _ = self.surrogate.predict(points)
        logs = self._log_costs(genomes)
        worst = np.array([self.log_cost_range()[1]])
        floor = float(values.min())
        reference = [v for g, v in zip(genomes, values, strict=True) if not g.options.any()]
        if reference:
            floor = max(floor, reference[0])
        cells = cut(logs[:, None], mean, worst, floor)
        parents = self._parents(genomes, mean, logs)
        pool = self._pool(parents)
        best: tuple[float, Genome] | None = None
        seen_pool = set(known)
        for _ in range(self.tuning.n_rounds + 1):
            fresh = []
            for genome in pool:
                if genome.key not in seen_pool:
                    seen_pool.add(genome.key)
                    fresh.append(genome)
            if not fresh:
                break
            m, s = self.surrogate.predict(self._points(fresh))
            gain = expected_gain(cells, self._log_costs(fresh)[:, None], m, s)
            order = np.argsort(-gain)
            if best is None or gain[order[0]] > best[0]:
                best = (float(gain[order[0]]), fresh[order[0]])
            pool = [
                self.space.drawer.mutate(fresh[i], self.rng) for i in order[:8] for _ in range(10)
            ]
            pool += [g for i in order[:2] for g in self.space.drawer.neighbours_in_rate(fresh[i])]
        if best is None:
            return super().propose(history)
        return best[1]

    def _design(self, usable: Sequence[Seen], known: set[Any]) -> Genome:
        low, high = self.log_cost_range()
        genomes = [s.genome for s in usable if s.genome is not None]
        taken = np.sort(np.clip(np.append(self._log_costs(genomes), [low, high]), low, high))
        draws = [
            self.space.drawer.at_cost(self.rng, self.rng.uniform(low, high)) for _ in range(12)
        ]
        draws = [d for d in draws if d.key not in known] or draws
        logs = self._log_costs(draws)
        distance = np.abs(logs[:, None] - taken[None, :]).min(axis=1) / (high - low)
        grid = self.space.grid
        used = np.zeros(len(grid.methods) + 1)
        for genome in genomes:
            used += np.bincount(grid.method_of[genome.options] + 1, minlength=len(used)) > 0
        novelty = [
            np.mean(1.0 / (1.0 + used[1:][np.unique(grid.method_of[d.options[d.options > 0]])]))
            for d in draws
        ]
        return draws[int(np.argmax(distance + 0.1 * np.array(novelty)))]

    def _points(self, genomes: Sequence[Genome]) -> Points:
        options = np.array([g.options for g in genomes])
        position = np.array([g.position for g in genomes])
        return self._embedding.points(options, position, self._log_costs(genomes))

    def _log_costs(self, genomes: Sequence[Genome]) -> NDArray[np.float64]:
        if not genomes:
            return np.zeros(0)
        options = np.array([g.options for g in genomes])
        return np.log(np.maximum(self.space.drawer.params(options), 1.0))

    def _parents(
        self, genomes: Sequence[Genome], mean: NDArray[np.float64], logs: NDArray[np.float64]
    ) -> list[Genome]:
        points = np.column_stack([mean, -logs])
        first = non_dominated(points)
        rest = np.flatnonzero(~first)
        second = rest[non_dominated(points[rest])] if len(rest) else rest
        return [genomes[int(i)] for i in (*np.flatnonzero(first), *second)]

    def _pool(self, parents: Sequence[Genome]) -> list[Genome]:
        drawer, rng, tuning = self.space.drawer, self.rng, self.tuning
        pool = []
        for _ in range(tuning.n_mutants):
            genome = parents[int(rng.integers(len(parents)))]
            for _ in range(1 + int(rng.random() < 0.4) + int(rng.random() < 0.2)):
                genome = drawer.mutate(genome, rng)
            pool.append(genome)
        for _ in range(tuning.n_children):
            one, two = (int(i) for i in rng.integers(len(parents), size=2))
            pool.append(drawer.crossover(parents[one], parents[two], rng))
        low, high = self.log_cost_range()
        pool += [drawer.at_cost(rng, rng.uniform(low, high), 1) for _ in range(tuning.n_draws)]
        return pool
