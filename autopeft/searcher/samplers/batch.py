"""Several proposals from one fit of the models: each takes the earlier ones for granted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autopeft.searcher.samplers.ehvi import (
    Decomposition,
    decompose,
    expected_hypervolume_improvement,
)
from autopeft.searcher.space.encoding import Point

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Front:
    """What a candidate must exceed.

    Attributes:
        costs: Costs of the members, smaller is better, shape (n, n_costs).
        quality: Their qualities, larger is better, shape (n,).
        worst: Costs of the reference point, shape (n_costs,).
        floor: Quality of the reference point.
    """

    costs: Array
    quality: Array
    worst: Array
    floor: float

    @cached_property
    def cells(self) -> Decomposition:
        """The cost space divided at the members."""
        return decompose(self.costs, self.quality, self.worst, self.floor)

    def joined(self, costs: Array, quality: float) -> Front:
        """Return the front with one more point, of costs of shape (n_costs,)."""
        costs = np.vstack([self.costs, costs])
        return Front(costs, np.append(self.quality, quality), self.worst, self.floor)


@dataclass(frozen=True)
class Scoring:
    """Candidates with all that their improvements of any front depend on, each of length n.

    Attributes:
        points: The candidates.
        costs: Costs and means of further qualities, shape (n, n_costs).
        cost_spread: What of their standard deviations counts, 0 for known costs, the same shape.
        mean: Expected quality, larger is better.
        spread: What of its standard deviation counts.
        chance: Probability that the candidate trains and keeps all limits.
        effort: What the improvement is divided by.
        is_small: Whether its size is allowed.
    """

    points: Sequence[Point]
    costs: Array
    cost_spread: Array
    mean: Array
    spread: Array
    chance: Array
    effort: Array
    is_small: NDArray[np.bool_]

    def improvements(self, cells: Decomposition) -> Array:
        """Return the expected improvement per effort, shape (n,); -1 above a limit on size."""
        gains = expected_hypervolume_improvement(
            cells, self.costs, self.mean, self.spread, self.cost_spread
        )
        return np.where(self.is_small, gains * self.chance / self.effort, -1.0)


class Batch:
    """Hands out candidates one by one, each with the largest improvement beside those before it.

    One that was handed out counts as if it had its expected quality already, so the next one is
    elsewhere. The first of the candidates counts as handed out.

    Args:
        front: The front without them.
        scoring: The candidates.

    Attributes:
        front: The front with those that were handed out.

    Source: the "kriging believer" (Ginsbourger, Le Riche and Carraro, 2010).
    """

    def __init__(self, front: Front, scoring: Scoring) -> None:
        self.front = front
        self._scoring = scoring
        self._is_left = np.ones(len(scoring.points), dtype=bool)
        self._take(0)

    def _take(self, index: int) -> None:
        self._is_left[index] = False
        costs, mean = self._scoring.costs[index], float(self._scoring.mean[index])
        self.front = self.front.joined(costs, mean)

    def next(self) -> Point | None:
        """Return the next candidate; None if none that is left improves the front."""
        gains = np.where(self._is_left, self._scoring.improvements(self.front.cells), -1.0)
        index = int(np.argmax(gains))
        if not gains[index] > 0.0:
            return None
        self._take(index)
        return self._scoring.points[index]
