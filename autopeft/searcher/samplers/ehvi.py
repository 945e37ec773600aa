"""Expected hypervolume improvement when costs are known and only quality is uncertain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Array = NDArray[np.float64]


@dataclass(frozen=True)
class BoxDecomposition:
    """The cost space divided into cells, each with the best quality so far at its cost.

    Attributes:
        lows: Lower corner of each cell, shape (n_cells, n_costs).
        highs: Upper corner, shape (n_cells, n_costs).
        best: Best quality at no more than the cell's cost, shape (n_cells,); larger is better.
    """

    lows: Array
    highs: Array
    best: Array


def decompose(
    costs: Array, quality: Array, worst_cost: Array, worst_quality: float
) -> BoxDecomposition:
    """Divide the cost space at the costs of some points.

    Args:
        costs: Shape (n, n_costs), smaller is better; any points, not only a front.
        quality: Shape (n,), larger is better.
        worst_cost: Costs of the reference point, shape (n_costs,).
        worst_quality: Quality of the reference point; the best quality of a cell without points.

    Returns:
        A grid over the distinct costs below the reference. The lowest cells start at minus
        infinity.
    """
    n_costs = costs.shape[1]
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


def expected_hypervolume_improvement(
    boxes: BoxDecomposition, costs: Array, mean: Array, spread: Array
) -> Array:
    """Return the exact expected hypervolume improvement of each candidate on its own.

    Args:
        boxes: The current front, see `decompose`.
        costs: Known costs, shape (m, n_costs).
        mean: Expected quality, shape (m,).
        spread: Standard deviation of the quality, shape (m,), positive.

    Returns:
        Shape (m,), in quality times the product of the costs' units.

    Source: expected improvement (Jones et al., 1998) over each cell's best quality, times the
    volume of the part of the cell that the candidate can afford.
    """
    starts = np.maximum(boxes.lows[None, :, :], costs[:, None, :])  # (m, cells, costs)
    volumes = np.maximum(boxes.highs[None, :, :] - starts, 0.0).prod(axis=2)
    z = (mean[:, None] - boxes.best[None, :]) / spread[:, None]
    density = np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi)
    improvement = spread[:, None] * (z * ndtr(z) + density)
    total: Array = (volumes * improvement).sum(axis=1)
    return total
