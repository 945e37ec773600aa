"""The hypervolume of a front, by which benchmarks and tests compare searches.

Points are *oriented*: every column is "larger is better". A point with a NaN adds nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from autopeft.utils.pareto import non_dominated

Array = NDArray[np.float64]


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume between a front and a reference point, exactly, for any number of columns.

    Args:
        points: Shape (n, m), larger is better. Points not better than the reference in every
            column add nothing.
        reference: Shape (m,), the worst corner.

    Returns:
        The volume, in the product of the columns' units. 0.0 for an empty front.

    Source: sweep over the last column; each slab is a hypervolume with one column fewer.
    """
    corner = np.asarray(reference, dtype=float)
    array = np.asarray(points, dtype=float).reshape(-1, len(corner))
    array = array[np.greater(array, corner).all(axis=1)] - corner
    return _volume(array[non_dominated(array)])


def _volume(front: Array) -> float:
    """Hypervolume above the origin of positive, mutually non-dominated points."""
    if not len(front):
        return 0.0
    if front.shape[1] == 1:
        return float(front.max())
    front = front[np.argsort(-front[:, -1], kind="stable")]
    if front.shape[1] == 2:
        # Sorted by the second column downwards, the first column rises along the front.
        rise = np.maximum.accumulate(front[:, 0])
        steps = np.diff(rise, prepend=0.0)
        return float((steps * front[:, 1]).sum())
    floors = np.append(front[1:, -1], 0.0)
    total = 0.0
    for count, (top, floor) in enumerate(zip(front[:, -1], floors, strict=True), start=1):
        if top > floor:
            slab = front[:count, :-1]
            total += (top - floor) * _volume(slab[non_dominated(slab)])
    return total
