"""Expected hypervolume improvement when costs are known and qualities are uncertain.

One quality leads. A further one is a column beside the costs, oriented alike, with a spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

Array = NDArray[np.float64]

_MAX_EXACT = 2
"""Costs up to which the cost space is divided exactly: a grid's cells grow with their power."""

_N_RAYS, _MAX_CELLS = 256, 4096
"""Rays that sample more costs than that, and the number of cells on all that are used."""

_N_DRAWS = 8
"""Draws of uncertain columns, where the volume has no closed form."""


class Decomposition(Protocol):
    """The cost space divided into cells, each with the best quality so far at its cost."""

    @property
    def best(self) -> Array:
        """Best quality at no more than the cell's cost, shape (n_cells,); larger is better."""

    def volumes(self, costs: Array, spread: Array | None = None) -> Array:
        """Return the expected volume of each cell that costs of shape (m, n_costs) can afford.

        Args:
            costs: Costs, or their means.
            spread: Standard deviations of normal ones that are independent, 0 where a cost is
                known, shape (m, n_costs); None: all are known.

        Returns:
            Shape (m, n_cells).
        """


@dataclass(frozen=True)
class BoxDecomposition:
    """The cost space divided into boxes, exactly.

    Attributes:
        lows: Lower corner of each cell, shape (n_cells, n_costs).
        highs: Upper corner, shape (n_cells, n_costs).
        best: See `Decomposition`.
    """

    lows: Array
    highs: Array
    best: Array

    def volumes(self, costs: Array, spread: Array | None = None) -> Array:
        """See `Decomposition`; exact."""
        volumes = np.ones((len(costs), len(self.best)))
        spreads = np.zeros_like(costs) if spread is None else spread
        for low, high, cost, each in zip(
            self.lows.T, self.highs.T, costs.T, spreads.T, strict=True
        ):
            volumes *= _below(high, cost, each) - _below(low, cost, each)
        return volumes


@dataclass(frozen=True)
class RayDecomposition:
    """Rays from the worst costs through a sample of the cost space, cut where the best changes.

    A ray stands for an equal share of the unit box, which it leaves at distance 1. So the volume up
    to a distance on it is that distance to the power of the number of costs.

    Attributes:
        worst: Costs where the rays begin, shape (n_costs,).
        rays: What a unit of distance saves of each cost, shape (n_rays, n_costs).
        ray_of: Ray of each cell, shape (n_cells,).
        inner: Volume up to the near end of each cell, shape (n_cells,).
        outer: Volume up to its far end; that of a ray's last cell is infinite.
        best: See `Decomposition`.
        unit: Volume of the box that the rays divide, over their number.
    """

    worst: Array
    rays: Array
    ray_of: NDArray[np.int64]
    inner: Array
    outer: Array
    best: Array
    unit: float

    def volumes(self, costs: Array, spread: Array | None = None) -> Array:
        """See `Decomposition`; with a spread, the mean over draws that all candidates share."""
        if spread is not None and spread.any():
            draws = _normal_draws(costs.shape[1])
            sampled = [self.volumes(costs + spread * draw) for draw in draws]
            return np.asarray(np.mean(sampled, axis=0))
        reach = _reach(costs, self.worst, self.rays) ** len(self.worst)
        reached = np.minimum(reach[:, self.ray_of], self.outer)
        volumes: Array = self.unit * np.maximum(reached - self.inner, 0.0)
        return volumes


def _below(edge: Array, cost: Array, spread: Array) -> Array:
    """Return the expected length from a cost up to an edge, 0 above it; (m, n_cells)."""
    length = edge - cost[:, None]
    known: Array = np.maximum(length, 0.0)
    if not spread.any():
        return known
    deviation = np.maximum(spread, 1e-12)[:, None]
    z = np.maximum(length / deviation, -40.0)  # Nothing is left there, and squares are finite.
    expected: Array = deviation * (z * ndtr(z) + np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi))
    return np.where(spread[:, None] > 0, expected, known)


@cache
def _normal_draws(n_columns: int) -> Array:
    """Return evenly spread draws of independent normal numbers, shape (_N_DRAWS, n_columns)."""
    quantiles = ndtri((np.arange(_N_DRAWS) + 0.5) / _N_DRAWS)
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(quantiles) for _ in range(n_columns)], axis=1)


def decompose(
    costs: Array, quality: Array, worst_cost: Array, worst_quality: float
) -> Decomposition:
    """Divide the cost space at the costs of some points.

    Args:
        costs: Shape (n, n_costs), smaller is better; any points, not only a front.
        quality: Shape (n,), larger is better.
        worst_cost: Costs of the reference point, shape (n_costs,).
        worst_quality: Quality of the reference point; the best quality of a cell without points.

    Returns:
        Up to two costs, a grid over the distinct costs below the reference. The lowest cells start
        at minus infinity. Above, rays.
    """
    n_costs = costs.shape[1]
    if n_costs > _MAX_EXACT:
        return _rays(costs, quality, worst_cost, worst_quality)
    if not n_costs:
        best = np.array([max(worst_quality, float(quality.max(initial=-np.inf)))])
        return BoxDecomposition(np.zeros((1, 0)), np.zeros((1, 0)), best)
    edges = [np.unique(np.clip(costs[:, k], None, worst_cost[k])) for k in range(n_costs)]
    edges = [np.concatenate([[-np.inf], e[e < worst_cost[k]]]) for k, e in enumerate(edges)]
    lows = np.stack([g.ravel() for g in np.meshgrid(*edges, indexing="ij")], axis=1)
    highs_by_axis = [np.append(e[1:], worst_cost[k]) for k, e in enumerate(edges)]
    highs = np.stack([g.ravel() for g in np.meshgrid(*highs_by_axis, indexing="ij")], axis=1)
    is_affordable = (costs[None, :, :] <= lows[:, None, :] + 1e-12).all(axis=2)
    best = np.where(is_affordable, quality[None, :], worst_quality).max(
        axis=1, initial=worst_quality
    )
    return BoxDecomposition(lows, highs, best)


def _rays(
    costs: Array, quality: Array, worst_cost: Array, worst_quality: float
) -> RayDecomposition:
    """Sample the cost space: along a ray there is one cost, the distance not gone."""
    n_costs = costs.shape[1]
    scale = np.maximum(worst_cost - costs.min(axis=0, initial=np.inf), 1e-9)
    scale = np.where(np.isfinite(scale), scale, 1.0)
    rays = _directions(n_costs) * scale
    reach = _reach(costs, worst_cost, rays).T
    order = np.argsort(-reach, axis=1, kind="stable")
    # From the far end, where nothing is affordable, to the near one, where everything is.
    ends = np.take_along_axis(reach, order, axis=1)
    ends = np.column_stack([np.full(len(rays), np.inf), ends])
    found = np.column_stack([np.full(len(rays), worst_quality), quality[order]])
    best = np.maximum.accumulate(found, axis=1)
    is_cut = np.diff(best, axis=1, prepend=-np.inf) > 0
    n_rays = max(1, int((is_cut.sum(axis=1).cumsum() <= _MAX_CELLS).sum()))
    ray_of, column = np.nonzero(is_cut[:n_rays])
    outer = ends[ray_of, column] ** n_costs
    is_last = np.append(ray_of[1:] != ray_of[:-1], True)
    inner = np.where(is_last, 0.0, np.append(outer[1:], 0.0))
    unit = float(scale.prod()) / n_rays
    return RayDecomposition(
        worst_cost, rays[:n_rays], ray_of, inner, outer, best[ray_of, column], unit
    )


def _directions(n_costs: int) -> Array:
    """Return points spread evenly over those sides of the unit box that do not touch the origin.

    Source: the R sequence (Roberts, 2018), a Kronecker sequence, on each side in turn.
    """
    golden = 2.0
    for _ in range(50):
        golden = (1.0 + golden) ** (1.0 / (n_costs + 1))
    index = np.arange(_N_RAYS)[:, None] // n_costs
    points = (0.5 + (1 + index) * golden ** -np.arange(1.0, n_costs + 1)) % 1.0
    points[np.arange(_N_RAYS), np.arange(_N_RAYS) % n_costs] = 1.0
    return np.maximum(points, 1e-9)


def _reach(costs: Array, worst: Array, rays: Array) -> Array:
    """Return how far each ray stays affordable to each of some costs, shape (m, n_rays)."""
    saved = np.maximum(worst - costs, 0.0)
    reach = np.full((len(costs), len(rays)), np.inf)
    for k in range(len(worst)):
        np.minimum(reach, saved[:, k, None] / rays[:, k], out=reach)
    return reach


def expected_hypervolume_improvement(
    cells: Decomposition, costs: Array, mean: Array, spread: Array, cost_spread: Array | None = None
) -> Array:
    """Return the expected hypervolume improvement of each candidate on its own.

    It is exact up to two costs, uncertain ones included. With more, it is that of a sample of the
    cost space, whose size does not depend on their number.

    Args:
        cells: The current front, see `decompose`.
        costs: Costs, and means of further qualities, shape (m, n_costs).
        mean: Expected quality, shape (m,).
        spread: Standard deviation of the quality, shape (m,), positive.
        cost_spread: That of the costs, shape (m, n_costs), 0 for a known one; None: all are known.
            Given its plan, qualities are independent.

    Returns:
        Shape (m,), in quality times the product of the costs' units.

    Source: expected improvement (Jones et al., 1998) over each cell's best quality, times the
    volume of the part of the cell that the candidate can afford. Hypervolume by random directions:
    Zhang and Golovin, 2020.
    """
    volumes = cells.volumes(costs, cost_spread)
    row, cell = np.nonzero(volumes)
    z = (mean[row] - cells.best[cell]) / spread[row]
    density = np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi)
    volumes[row, cell] *= spread[row] * (z * ndtr(z) + density)
    total: Array = volumes.sum(axis=1)
    return total
