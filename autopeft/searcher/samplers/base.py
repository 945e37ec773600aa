"""The Sampler protocol, and a sampler that is random and stratified by cost. Free of Optuna."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from autopeft.costs.constraints import Constraint
from autopeft.costs.objectives import Objective, Pricer
from autopeft.searcher.samplers.observations import History
from autopeft.searcher.space.encoding import Point
from autopeft.searcher.space.space import SearchSpace
from autopeft.trial import Trial


class Sampler(Protocol):
    """Proposes the next point to try.

    Both methods take all trials of the search in the order they were started. A trial keeps its
    place in the sequence when its state changes.

    Attributes:
        origin: "design" if the last point belongs to the initial design, else "search".
    """

    origin: str

    def propose(self, trials: Sequence[Trial]) -> Point:
        """Return the next point."""

    def propose_baseline(self, trials: Sequence[Trial], choices: Sequence[Point]) -> Point:
        """Return the LoRA baseline to try next."""


class StratifiedSampler:
    """Samples random points, uniform on a log scale of trainable parameters.

    Args:
        space: The search space.
        objectives: Quality first.
        pricer: Prices candidates.
        constraints: Limits on prices.
        seed: Random seed.

    Attributes:
        history: The trials seen so far.
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
        self.origin = "search"
        self.history = History(space, self.objectives[0])

    def propose(self, trials: Sequence[Trial]) -> Point:
        """Return a point that is not among the trials, unless the space seems exhausted."""
        self.history.update(trials)
        point = self.random_point()
        for _ in range(50):
            if point.key not in self.history.latest and self.is_allowed(point):
                break
            point = self.random_point()
        return point

    def random_point(self) -> Point:
        """Return any point, at a cost that is uniform on a log scale."""
        cost = self.rng.uniform(*self.log_cost_range())
        return self.space.point_sampler.at_cost(self.rng, cost)

    def propose_baseline(self, trials: Sequence[Trial], choices: Sequence[Point]) -> Point:
        """Return the first choice: they are sorted, most informative first."""
        return choices[0]

    def is_allowed(self, point: Point) -> bool:
        """Return whether the price of a point meets the constraints."""
        if not self.constraints:
            return True
        price = self.pricer.price(self.space.encoder.to_candidate(point))
        return all(limit.allows(price) for limit in self.constraints)

    def log_cost_range(self) -> tuple[float, float]:
        """Return logarithms of the fewest and most trainable parameters that are allowed."""
        low, high = self.space.cost_range()
        for limit in self.constraints:
            if limit.name == "trainable_params":
                high = min(high, limit.limit)
            elif limit.name == "adapter_bytes":
                high = min(high, limit.limit / 4)
        return float(np.log(max(low, 1.0))), float(np.log(max(high, low, 1.0)))
