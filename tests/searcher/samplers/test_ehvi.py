"""Tests of the expected gain of hypervolume."""

from __future__ import annotations

import numpy as np
import pytest
from hypervolume import hypervolume
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from autopeft.searcher.samplers.ehvi import decompose, expected_hypervolume_improvement


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 2), st.integers(0, 8))
def test_with_a_sure_quality_the_gain_is_the_growth_of_the_hypervolume(
    seed: int, n_costs: int, n: int
) -> None:
    rng = np.random.default_rng(seed)
    costs, quality = rng.random((n, n_costs)), rng.random(n)
    worst = np.full(n_costs, 1.0)
    new_cost, new_quality = rng.random((4, n_costs)), rng.random(4) * 1.2
    boxes = decompose(costs, quality, worst, 0.0)
    gains = expected_hypervolume_improvement(boxes, new_cost, new_quality, np.full(4, 1e-9))
    reference = np.append(0.0, -worst)
    before = np.column_stack([quality, -costs])
    for k in range(4):
        after = np.vstack([before, [[new_quality[k], *-new_cost[k]]]])
        growth = hypervolume(after, reference) - hypervolume(before, reference)
        assert gains[k] == pytest.approx(growth, abs=1e-7)


def test_the_gain_agrees_with_sampling() -> None:
    rng = np.random.default_rng(0)
    costs, quality = np.array([[0.2], [0.6]]), np.array([0.3, 0.8])
    boxes = decompose(costs, quality, np.array([1.0]), 0.0)
    (gain,) = expected_hypervolume_improvement(
        boxes, np.array([[0.4]]), np.array([0.6]), np.array([0.3])
    )
    reference = np.array([0.0, -1.0])
    front = np.column_stack([quality, -costs])
    before = hypervolume(front, reference)
    draws = [
        hypervolume(np.vstack([front, [[q, -0.4]]]), reference) - before
        for q in rng.normal(0.6, 0.3, 4000)
    ]
    assert gain == pytest.approx(np.mean(draws), abs=0.01)


@pytest.mark.parametrize("n_known", [1, 2])
def test_a_further_quality_is_an_uncertain_cost(n_known: int) -> None:
    """Of two uncertain qualities, the gain is the mean over draws of both."""
    rng = np.random.default_rng(1)
    n_costs = n_known + 1  # Three are sampled along rays, two are exact.
    costs, quality = rng.random((6, n_costs)), rng.random(6)
    cells = decompose(costs, quality, np.ones(n_costs), 0.0)
    cost, spread = rng.random((3, n_costs)), np.zeros((3, n_costs))
    spread[:, -1] = [0.1, 0.3, 0.6]
    mean, deviation = np.array([0.5, 0.7, 0.9]), np.array([0.1, 0.2, 0.3])
    gains = expected_hypervolume_improvement(cells, cost, mean, deviation, spread)
    reference = np.append(0.0, -np.ones(n_costs))
    front = np.column_stack([quality, -costs])
    before = hypervolume(front, reference)
    for k in range(3):
        draws = []
        for _ in range(1000):
            drawn = np.append(rng.normal(mean[k], deviation[k]), -rng.normal(cost[k], spread[k]))
            draws.append(hypervolume(np.vstack([front, drawn]), reference) - before)
        tolerance = 4 * np.std(draws) / np.sqrt(len(draws))
        assert gains[k] == pytest.approx(np.mean(draws), rel=0.15 * (n_known - 1), abs=tolerance)


def test_without_costs_it_is_expected_improvement() -> None:
    boxes = decompose(np.zeros((2, 0)), np.array([0.1, 0.5]), np.zeros(0), 0.0)
    gains = expected_hypervolume_improvement(
        boxes, np.zeros((2, 0)), np.array([0.4, 0.9]), np.full(2, 1e-9)
    )
    assert gains == pytest.approx([0.0, 0.4], abs=1e-6)


@pytest.mark.parametrize("n_costs", [3, 4, 6])
def test_with_many_costs_it_is_that_of_a_sample_of_the_cost_space(n_costs: int) -> None:
    rng = np.random.default_rng(0)

    def draw(n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        size = rng.random((n, 1))
        costs = 0.7 * size + 0.3 * rng.random((n, n_costs))
        return 5.0 + 3.0 * costs, 0.5 * size[:, 0] + 0.1 * rng.random(n)

    (costs, quality), (new_costs, new_quality) = draw(60), draw(80)
    cells = decompose(costs, quality, np.full(n_costs, 8.0), 0.0)
    gains = expected_hypervolume_improvement(cells, new_costs, new_quality, np.full(80, 1e-9))
    points = 5.0 + 3.0 * rng.random((20_000, n_costs))
    is_affordable = (costs <= points[:, None]).all(axis=2)
    best = np.where(is_affordable, quality, 0.0).max(axis=1)
    growth = np.maximum(new_quality[:, None] - best, 0.0)
    growth *= (new_costs[:, None] <= points).all(axis=2)
    expected = growth.mean(axis=1) * 3.0**n_costs
    assert np.corrcoef(gains, expected)[0, 1] > 0.98
    assert gains.sum() == pytest.approx(expected.sum(), rel=0.1)


@pytest.mark.parametrize("n_costs", [3, 6])
def test_the_work_for_a_candidate_is_bounded_with_many_costs(n_costs: int) -> None:
    rng = np.random.default_rng(0)
    costs = rng.random((300, n_costs))
    cells = decompose(costs, -costs.sum(axis=1), np.ones(n_costs), -float(n_costs))
    assert cells.volumes(costs).shape == (300, len(cells.best))
    assert len(cells.best) <= 4096


def test_many_costs_without_points_leave_one_cell_a_ray() -> None:
    cells = decompose(np.zeros((0, 3)), np.zeros(0), np.ones(3), 0.0)
    (gain,) = expected_hypervolume_improvement(
        cells, np.full((1, 3), 0.5), np.array([1.0]), np.full(1, 1e-9)
    )
    assert gain == pytest.approx(0.5**3, rel=0.1)
