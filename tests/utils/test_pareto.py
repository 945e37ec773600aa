"""Tests of the non-dominated set, the hypervolume and the picks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypervolume import hypervolume
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from autopeft.utils.pareto import knee, non_dominated, one_standard_error

small = st.integers(0, 5).map(float)


def brute_mask(points: list[list[float]]) -> list[bool]:
    def dominates(a: list[float], b: list[float]) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and any(
            x > y for x, y in zip(a, b, strict=True)
        )

    return [not any(dominates(other, p) for other in points) for p in points]


@settings(deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda m: arrays(float, st.tuples(st.integers(0, 12), st.just(m)), elements=small)
    )
)
def test_non_dominated_agrees_with_the_definition(points: np.ndarray) -> None:
    assert non_dominated(points).tolist() == brute_mask(points.tolist())


def test_a_point_with_nan_is_on_no_front_and_dominates_nothing() -> None:
    points = [[np.nan, 9.0], [1.0, 1.0], [0.0, 0.0]]
    assert non_dominated(points).tolist() == [False, True, False]


def test_equal_points_are_all_kept() -> None:
    assert non_dominated([[1.0, 2.0], [1.0, 2.0], [0.0, 1.0]]).tolist() == [True, True, False]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 4).flatmap(
        lambda m: arrays(float, st.tuples(st.integers(0, 7), st.just(m)), elements=small)
    )
)
def test_hypervolume_counts_the_unit_cells_below_the_front(points: np.ndarray) -> None:
    m = points.shape[1]
    cells = itertools.product(range(6), repeat=m)
    covered = sum(
        any(all(c < p for c, p in zip(cell, point, strict=True)) for point in points)
        for cell in cells
    )
    assert hypervolume(points, np.zeros(m)) == pytest.approx(covered)


def test_hypervolume_ignores_what_is_not_better_than_the_reference() -> None:
    assert hypervolume([[2.0, 2.0], [9.0, 0.5]], [1.0, 1.0]) == 1.0
    assert hypervolume(np.zeros((0, 2)), [0.0, 0.0]) == 0.0


def test_knee_is_the_best_bargain() -> None:
    assert knee([[0.0, 1.0], [0.9, 0.9], [1.0, 0.0], [np.nan, 5.0]]) == 1
    with pytest.raises(ValueError, match="without NaN"):
        knee([[np.nan, 1.0]])


def test_one_standard_error_takes_the_cheapest_that_is_close() -> None:
    assert one_standard_error([0.80, 0.82, 0.70], [0.01, 0.03, 0.01], [1.0, 5.0, 0.1]) == 0
    assert one_standard_error([0.80, 0.82, 0.70], [0.01, 0.01, 0.01], [1.0, 5.0, 0.1]) == 1
    assert one_standard_error([0.8, 0.9], [np.nan, np.nan], [1.0, 5.0]) == 1
    with pytest.raises(ValueError, match="finite"):
        one_standard_error([np.nan], [0.0], [1.0])
