"""The Sampler protocol, and a sampler that is random and stratified by cost. Free of Optuna."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np

from autopeft.searcher.samplers.observations import History
from autopeft.searcher.samplers.registry import Problem
from autopeft.searcher.space.encoding import Point
from autopeft.trial import Trial


class Sampler(Protocol):
    """Proposes the next point to try.

    All methods take all trials of the search in the order they were started. A trial keeps its
    place in the sequence when its state changes.
    """

    @property
    def origin(self) -> str:
        """The last point is of the initial "design" or of the "search", which is the default."""

    def propose(self, trials: Sequence[Trial]) -> Point:
        """Return the next point."""

    def propose_baseline(self, trials: Sequence[Trial], choices: Sequence[Point]) -> Point:
        """Return the LoRA baseline to try next; by default, the first choice."""

    def is_guided(self, trials: Sequence[Trial]) -> bool:
        """Return whether earlier searches make proposals better than recipes; by default, no."""


class StratifiedSampler:
    """Samples random points, uniform on a log scale of trainable parameters.

    Args:
        problem: What to propose points for.

    Attributes:
        history: The trials seen so far.
    """

    def __init__(self, problem: Problem) -> None:
        self.space = problem.space
        self.objectives = problem.objectives
        self.prices = problem.prices
        self.constraints = problem.constraints
        self.rng = np.random.default_rng(problem.seed)
        self.origin = "search"
        self.history = History(self.space, self.objectives[0])

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
        cost = self.rng.uniform(*self._log_cost_range)
        return self.space.point_sampler.at_cost(self.rng, cost)

    def is_guided(self, trials: Sequence[Trial]) -> bool:
        """Return False: it knows no earlier searches."""
        return False

    def propose_baseline(self, trials: Sequence[Trial], choices: Sequence[Point]) -> Point:
        """Return the first choice: they are sorted, most informative first."""
        return choices[0]

    def is_allowed(self, point: Point) -> bool:
        """Return whether the price of a point meets the constraints."""
        if not self.constraints:
            return True
        price = self.prices.price(self.space.encoder.to_candidate(point))
        return all(limit.allows(price) for limit in self.constraints)

    @cached_property
    def _log_cost_range(self) -> tuple[float, float]:
        return self.log_cost_range()

    def log_cost_range(self) -> tuple[float, float]:
        """Return logarithms of the fewest and most trainable parameters that are allowed."""
        low, high = self.space.cost_range()
        for limit in self.constraints:
            if limit.name == "trainable_params":
                high = min(high, limit.limit)
            elif limit.name == "adapter_bytes":
                high = min(high, limit.limit / 4)
        return float(np.log(max(low, 1.0))), float(np.log(max(high, low, 1.0)))
