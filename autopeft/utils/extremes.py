"""Numbers that are finite but not usable: one diverged perplexity among others."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

LARGEST = 1e100
"""Squares and products of a few numbers up to this are finite."""

_N_RANGES = 30.0
"""A number so many interquartile ranges from the median is clipped: a model of the others that must
also explain it sees no difference between them."""


def bounded(values: ArrayLike) -> Array:
    """Clip to numbers whose squares are finite; NaN stays.

    Example:
        >>> from autopeft.utils.extremes import bounded
        >>> bounded([1e308, -2.0, float("nan")]).tolist()
        [1e+100, -2.0, nan]
    """
    clipped: Array = np.clip(np.asarray(values, dtype=float), -LARGEST, LARGEST)
    return clipped


def one_nan(number: float) -> float:
    """Return a number; every NaN is the same object, so that equal records with one compare equal.

    Example:
        >>> from autopeft.utils.extremes import one_nan
        >>> {"x": one_nan(float("nan"))} == {"x": one_nan(float("nan"))}
        True
    """
    return math.nan if number != number else number


def usable(values: ArrayLike) -> Array:
    """Clip numbers that are far beyond the others; NaN stays.

    Example:
        >>> from autopeft.utils.extremes import usable
        >>> usable([1.0, 2.0, 3.0, 4.0, 1e160]).tolist()
        [1.0, 2.0, 3.0, 4.0, 63.0]
    """
    clipped = bounded(values)
    known = clipped[~np.isnan(clipped)]
    if not len(known):
        return clipped
    low, middle, high = np.quantile(known, [0.25, 0.5, 0.75])
    if (reach := _N_RANGES * (high - low)) > 0:
        clipped = np.clip(clipped, middle - reach, middle + reach)
    return clipped
