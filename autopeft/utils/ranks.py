"""Spearman's rank correlation with its interval, by numpy alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_FEWEST = 4


def rank_correlation(x: Array, y: Array) -> float:
    """Return Spearman's rank correlation; NaN where a side is constant."""
    a, b = _centered_ranks(x), _centered_ranks(y)
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else float("nan")


def correlation_interval(correlation: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the interval of a rank correlation of n pairs, by Fisher's transformation.

    The variance 1.06 / (n - 3) is that of Fieller, Hartley and Pearson (1957). Of fewer than four
    pairs nothing is known.
    """
    if n < _FEWEST or not np.isfinite(correlation):
        return -1.0, 1.0
    # The transformation of 1 is infinite.
    center = np.arctanh(np.clip(correlation, -1 + 1e-9, 1 - 1e-9))
    half = z * np.sqrt(1.06 / (n - 3))
    return float(np.tanh(center - half)), float(np.tanh(center + half))


def _centered_ranks(values: Array) -> Array:
    """Return average ranks minus their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]
    centered: Array = ranks - ranks.mean()
    return centered
