"""The chance that a training succeeds, from its methods, learning rate and size.

A logistic regression with a Gaussian prior on its coefficients: a rate that is too high for one
method is mostly too high for another, and a larger plan bears less. It says 1 until one has failed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from autopeft.searcher.samplers.gp import Features

Array = NDArray[np.float64]

_N_STEPS = 12
"""Steps of Newton's method."""

_PRIOR_MEAN = 2.0
"""Log odds of success before anything is known."""

_SPREADS = {"constant": 2.0, "rate": 8.0, "size": 2.0, "method": 1.0, "rate by method": 4.0}
"""Prior standard deviations of the coefficients."""


class SuccessModel:
    """Predicts the chance of success; see the module."""

    def __init__(self) -> None:
        self._weights: Array | None = None

    def fit(self, features: Features, succeeded: NDArray[np.bool_]) -> None:
        """Fit to trials that ended.

        Args:
            features: Features of their points.
            succeeded: False for those that failed, shape (n,).
        """
        self._weights = None
        if succeeded.all():
            return
        rows = _columns(features)
        n_methods = features.shares.shape[1] - 1
        counts = (1, 1, 1, n_methods, n_methods)
        precision = np.repeat([1.0 / spread**2 for spread in _SPREADS.values()], counts)
        mean = np.zeros(len(precision))
        mean[0] = _PRIOR_MEAN
        weights = mean.copy()
        for _ in range(_N_STEPS):
            chance = expit(rows @ weights)
            slope = rows.T @ (succeeded - chance) - precision * (weights - mean)
            curvature = (rows.T * (chance * (1.0 - chance))) @ rows + np.diag(precision)
            weights = weights + np.clip(np.linalg.solve(curvature, slope), -3.0, 3.0)
        self._weights = weights

    def predict(self, features: Features) -> Array:
        """Return the chance of success, shape (n,)."""
        if self._weights is None:
            return np.ones(len(features))
        chance: Array = expit(_columns(features) @ self._weights)
        return chance


def _columns(features: Features) -> Array:
    """Return the inputs of the regression, shape (n, 3 + 2 * n_methods)."""
    used = (features.shares[:, 1:] > 0).astype(float)
    rate = features.position[:, None] - 0.5
    size = features.log_cost[:, None] - 0.5
    return np.hstack([np.ones_like(rate), rate, size, used, used * rate])
