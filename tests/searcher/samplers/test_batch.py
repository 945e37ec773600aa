"""Several proposals from one fit: each is best beside those before it."""

from __future__ import annotations

import numpy as np
import pytest

from autopeft.searcher.samplers.batch import Batch, Front, Scoring
from autopeft.searcher.space.encoding import Point


def batch(costs: list[float], mean: list[float], is_small: list[bool] | None = None) -> Batch:
    n = len(costs)
    front = Front(np.array([[5.0]]), np.array([0.5]), np.array([10.0]), 0.0)
    points = [Point(np.array([index])) for index in range(n)]
    scoring = Scoring(
        points,
        np.array(costs)[:, None],
        np.zeros((n, 1)),
        np.array(mean),
        np.full(n, 1e-3),
        np.ones(n),
        np.ones(n),
        np.array(is_small or [True] * n),
    )
    return Batch(front, scoring)


def handed_out(found: Batch) -> list[int]:
    order: list[int] = []
    while (point := found.next()) is not None and len(order) < 10:
        order.append(int(point.options[0]))
    return order


def test_the_next_one_is_elsewhere() -> None:
    """On their own, the first three would be best: they are near the one handed out."""
    found = batch([6.0, 6.1, 6.2, 2.0], [0.9, 0.9, 0.9, 0.3])
    assert handed_out(found)[0] == 3
    assert len(found.front.costs) >= 3


def test_nothing_is_handed_out_twice_and_nothing_that_adds_nothing() -> None:
    assert handed_out(batch([6.0, 8.0, 4.0], [0.9, 0.2, 0.4])) == [2]


def test_none_is_above_the_limit_on_size() -> None:
    assert handed_out(batch([6.0, 4.0, 3.0], [0.9, 0.45, 0.4], [True, False, True])) == [2]


@pytest.mark.parametrize("n", [1, 5])
def test_the_first_counts_as_handed_out(n: int) -> None:
    assert 0 not in handed_out(batch([6.0] * n, [0.9] * n))
