"""Rank correlations are scipy's, and their intervals hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from autopeft.utils.ranks import correlation_interval, rank_correlation


def test_it_is_spearmans_with_ties() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 30).astype(float), rng.integers(0, 4, 30).astype(float)
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert math.isnan(rank_correlation(x, np.ones(30)))


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = []
    truth = 6 / math.pi * math.asin(0.7 / 2)  # of two normal variables with correlation 0.7
    for _ in range(400):
        x = rng.normal(size=20)
        y = 0.7 * x + math.sqrt(1 - 0.49) * rng.normal(size=20)
        low, high = correlation_interval(rank_correlation(x, y), 20)
        held.append(low <= truth <= high)
    assert 0.92 < np.mean(held) < 0.98


def test_of_few_pairs_or_a_constant_nothing_is_known() -> None:
    assert correlation_interval(0.9, 3) == (-1.0, 1.0)
    assert correlation_interval(float("nan"), 30) == (-1.0, 1.0)
