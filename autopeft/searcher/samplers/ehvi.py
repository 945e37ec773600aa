"""Expected gain of hypervolume when costs are known and only quality is uncertain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Cells:
    """The cost axes cut into cells, with the best quality so far that each cell can afford.

    Attributes:
        lows: Lower corner of each cell, shape (n_cells, n_costs).
        highs: Upper corner, shape (n_cells, n_costs).
        best: Best quality at no more than the cell's cost, shape (n_cells,).
    """

    lows: Array
    highs: Array
    best: Array


def cut(costs: Array, quality: Array, worst_cost: Array, worst_quality: float) -> Cells:
    """Cells between the costs of the front's members.

    Args:
        costs: Shape (n, n_costs), smaller is better; any points, not only a front.
        quality: Shape (n,), larger is better.
        worst_cost: The reference's costs, shape (n_costs,).
        worst_quality: The reference's quality: what a cell holds that no point can afford.

    Returns:
        A grid over the distinct costs of points that matter. Cells below the lowest cost start at
        minus infinity, cut off at the point a candidate has there.
    """
    n_costs = costs.shape[1]
    if not n_costs:
        best = np.array([max(worst_quality, float(quality.max(initial=-np.inf)))])
        return Cells(np.zeros((1, 0)), np.zeros((1, 0)), best)
    edges = [np.unique(np.clip(costs[:, k], None, worst_cost[k])) for k in range(n_costs)]
    edges = [np.concatenate([[-np.inf], e[e < worst_cost[k]]]) for k, e in enumerate(edges)]
    lows = np.stack([g.ravel() for g in np.meshgrid(*edges, indexing="ij")], axis=1)
    highs_by_axis = [np.append(e[1:], worst_cost[k]) for k, e in enumerate(edges)]
    highs = np.stack([g.ravel() for g in np.meshgrid(*highs_by_axis, indexing="ij")], axis=1)
    affordable = (costs[None, :, :] <= lows[:, None, :] + 1e-12).all(axis=2)
    best = np.where(affordable, quality[None, :], worst_quality).max(axis=1, initial=worst_quality)
    return Cells(lows, highs, best)


def expected_gain(cells: Cells, costs: Array, mean: Array, spread: Array) -> Array:
    """Expected growth of the hypervolume by one candidate, exactly.

    Args:
        cells: As `cut` made them.
        costs: Shape (m, n_costs), known.
        mean: Expected quality, shape (m,).
        spread: Its standard deviation, shape (m,).

    Returns:
        Shape (m,), in quality times the product of the costs' units.

    Source: the expected improvement over each cell's best quality, times the part of the cell the
    candidate can afford.
    """
    starts = np.maximum(cells.lows[None, :, :], costs[:, None, :])  # (m, cells, costs)
    shares = np.maximum(cells.highs[None, :, :] - starts, 0.0).prod(axis=2)
    z = (mean[:, None] - cells.best[None, :]) / spread[:, None]
    density = np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi)
    improvement = spread[:, None] * (z * ndtr(z) + density)
    gain: Array = (shares * improvement).sum(axis=1)
    return gain
