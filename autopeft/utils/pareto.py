"""The non-dominated set, its hypervolume, and the rules that pick one member of it.

Everything here takes plain arrays. Points are *oriented*: every column is "larger is better". NaN
policy, everywhere: a point with a NaN is on no front and dominates nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other point dominates.

    A point dominates another if it is at least as good in every column and better in one. Equal
    points do not dominate each other, so all copies of a front point are kept.

    Args:
        points: Shape (n, m), larger is better.

    Returns:
        Boolean mask, shape (n,).
    """
    array = np.asarray(points, dtype=float)
    keep = np.zeros(len(array), dtype=bool)
    if not len(array):
        return keep
    valid = np.flatnonzero(~np.isnan(array).any(axis=1))
    # Best first column first: a point can only be dominated by one that was already seen, or by an
    # equal first column, which the lexicographic order of the rest puts before it.
    order = valid[np.lexsort(tuple(-array[valid].T[::-1]))]
    front: list[int] = []
    for index in order:
        rivals = array[front]
        is_covered = (rivals >= array[index]).all(axis=1)
        if not (is_covered & (rivals > array[index]).any(axis=1)).any():
            front.append(index)
    keep[front] = True
    return keep


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


def knee(points: ArrayLike) -> int:
    """Index of the front member with the best bargain between the extremes.

    Columns are scaled to [0, 1] over the points; the knee is the point with the largest sum, which
    for two columns is the one farthest above the line between the extremes.

    Args:
        points: Shape (n, m), n >= 1, larger is better.

    Raises:
        ValueError: if no point is free of NaN.
    """
    array = np.asarray(points, dtype=float)
    on_front = np.flatnonzero(non_dominated(array))
    if not len(on_front):
        raise ValueError(
            f"a knee needs at least one point without NaN, but got {len(array)} points"
        )
    front = array[on_front]
    span = np.ptp(front, axis=0)
    scaled = (front - front.min(axis=0)) / np.where(span > 0, span, 1.0)
    return int(on_front[np.argmax(scaled.sum(axis=1))])


def one_standard_error(quality: ArrayLike, error: ArrayLike, cost: ArrayLike) -> int:
    """Index of the cheapest candidate within one standard error of the best quality.

    Args:
        quality: Shape (n,), larger is better.
        error: Shape (n,), standard error of each quality; NaN counts as 0.
        cost: Shape (n,), smaller is better.

    Raises:
        ValueError: if every quality is NaN.

    Source: Breiman et al., Classification and Regression Trees (1984), the 1-SE rule.
    """
    scores = np.asarray(quality, dtype=float)
    if not np.isfinite(scores).any():
        raise ValueError("the one-standard-error rule needs one finite quality, but got none")
    best = int(np.nanargmax(scores))
    margin = float(np.nan_to_num(np.asarray(error, dtype=float))[best])
    is_close = scores >= scores[best] - margin
    prices = np.where(is_close, np.asarray(cost, dtype=float), np.inf)
    # Among equally cheap ones the better wins.
    return int(np.lexsort((-scores, prices))[0])
