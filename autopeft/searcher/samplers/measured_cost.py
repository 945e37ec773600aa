"""A cost that is only measured, predicted from what it is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Array = NDArray[np.float64]

_PRIOR = 0.1
"""Weight of the expectation that a site costs the same with every method, in trials."""


@dataclass(frozen=True)
class MeasuredCost:
    """A fixed part, a part that grows with a known cost, and a part for each adapted site.

    Small adapters take most of their time to be called, not to be computed: IA3 has no FLOPs at
    all. So what a site costs depends on its method.

    Attributes:
        fixed: The cost without adapters.
        slope: Measured for each unit of the known cost.
        sites: For each site, by method, shape (n_methods,).
    """

    fixed: float
    slope: float
    sites: Array

    @classmethod
    def fit(cls, known: Array, sites: Array, measured: Array) -> MeasuredCost:
        """Fit to trials by least squares of the relative error, with no part below zero.

        Args:
            known: Known cost that goes with it, shape (n,).
            sites: Number of adapted sites by method, shape (n, n_methods).
            measured: Measured cost, positive, shape (n,).
        """
        total = sites.sum(axis=1)
        _, _, each = _fit(np.column_stack([np.ones(len(known)), known, total]), measured, 0.0)
        # A method that was not tried yet is no gift: it costs as much as the others.
        columns = np.column_stack([np.ones(len(known)), known, sites])
        scale = np.sqrt(np.mean((total / measured) ** 2))
        fixed, slope, *parts = _fit(columns, measured, each, _PRIOR * scale)
        return cls(fixed, slope, np.array(parts))

    def predict(self, known: Array, sites: Array) -> Array:
        """Return the cost, shape (n,)."""
        cost: Array = self.fixed + self.slope * known + sites @ self.sites
        return cost


def _fit(columns: Array, measured: Array, each: float, weight: float = 0.0) -> list[float]:
    """Return non-negative factors of the columns; those from the third on are drawn to `each`."""
    prior = np.eye(columns.shape[1])[2:] * weight
    rows = np.vstack([columns / measured[:, None], prior])
    target = np.concatenate([np.ones(len(measured)), prior.sum(axis=1) * each])
    scale = np.maximum(np.sqrt((rows**2).sum(axis=0)), 1e-300)
    factors, _ = nnls(rows / scale, target)
    return list((factors / scale).tolist())
