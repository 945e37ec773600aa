"""The table of gaps is the same however it grew; what a rung says is hopeless."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopeft.searcher.pruners.rung_table import RungTable


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10_000), st.integers(0, 3), st.integers(1, 150))
def test_a_table_that_grows_report_by_report_holds_the_gaps(
    seed: int, n_costs: int, n: int
) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.integers(0, 5, (n, n_costs)).astype(float)
    scores = rng.integers(0, 9, n).astype(float)
    table = RungTable(n_costs)
    for number in range(n):
        table.add(number, costs[number])
        for reporting in {number, int(rng.integers(number + 1))} if number % 2 else ():
            table.report(reporting, 3, scores[reporting])
    table.add(1 % n, costs[1 % n] + 1.0)  # a price that changes
    costs[1 % n] += 1.0
    for number in rng.permutation(n):
        table.report(int(number), 3, scores[number])
    expected = []
    for number in range(n):
        is_peer = (costs <= costs[number]).all(axis=1) & (np.arange(n) != number)
        expected.append(scores[is_peer].max(initial=-np.inf) - scores[number])
    assert table.gaps_at(3, np.arange(n)).tolist() == expected


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10_000), st.integers(0, 3), st.integers(2, 80))
def test_an_excluded_trial_stops_no_others_whenever_it_was_excluded(
    seed: int, n_costs: int, n: int
) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.integers(0, 5, (n, n_costs)).astype(float)
    scores = rng.integers(0, 9, n).astype(float)
    is_excluded = rng.random(n) < 0.3
    table = RungTable(n_costs)
    for number in range(n):
        table.add(number, costs[number])
        if is_excluded[number] and number % 2:
            table.exclude(number)
        table.report(number, 3, scores[number])
    for number in np.flatnonzero(is_excluded).tolist():
        table.exclude(number)
    table.add(0, costs[0] + 1.0)
    costs[0] += 1.0
    for number in range(n):
        is_peer = (costs <= costs[number]).all(axis=1) & (np.arange(n) != number) & ~is_excluded
        best = scores[is_peer].max(initial=-np.inf)
        assert table.gaps_at(3, np.array([number])).tolist() == [best - scores[number]]
        if best <= scores[number]:
            assert table.gap_to_stop(number, 9.0, 3.0, 2) == 0.0


def test_only_what_is_no_worse_in_every_quality_beats_a_trial() -> None:
    table = RungTable(1, 1)
    for number in range(4):
        table.add(number, [1.0])
    table.report(0, 3, 0.9, [0.5])  # better, but it forgets more than 1
    table.report(1, 3, 0.5, [0.1])
    table.report(2, 3, 0.4, [0.6])  # dominated by both
    table.report(3, 3, 0.1, [math.nan])  # nobody knows
    gaps = table.gaps_at(3, np.arange(4))
    assert gaps.tolist() == [pytest.approx(-0.4), -math.inf, 0.5, -math.inf]
    assert table.gap_to_stop(2, 9.0, 3.0, 2) > 0
    assert [table.gap_to_stop(number, 9.0, 3.0, 2) for number in (1, 3)] == [0.0, 0.0]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(2, 90))
def test_no_trial_is_beaten_but_by_one_that_dominates_it(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    paid, scores = rng.integers(0, 4, (n, 2)).astype(float), rng.integers(0, 5, n).astype(float)
    table = RungTable(1, 1)
    for number in range(n):
        table.add(number, [paid[number, 0]])
        table.report(number, 3, scores[number], [paid[number, 1]])
    for number in range(n):
        others = (paid <= paid[number]).all(axis=1) & (np.arange(n) != number)
        if not (scores[others] > scores[number]).any():
            assert table.gap_to_stop(number, 9.0, 3.0, 2) == 0.0


def curves(finals: Sequence[float], scores: Sequence[float]) -> RungTable:
    """Complete trials of rising cost, all with a score at step 3, and one more that is running."""
    table = RungTable(1)
    for number, score in enumerate(scores):
        table.add(number, [float(number)])
        table.report(number, 3, score)
        if number < len(finals):
            table.end(number, finals[number])
    return table


FINALS = [0.5, 0.7, 0.6, 0.9, 0.8, 0.55, 0.75, 0.65]


def test_a_rung_that_tells_all_makes_what_is_behind_hopeless() -> None:
    scores = [final / 2 for final in FINALS]
    assert curves(FINALS, [*scores, 0.44]).is_hopeless(8, 10.0, 1.0)
    assert not curves(FINALS, [*scores, 0.46]).is_hopeless(8, 10.0, 1.0)


def test_what_only_an_excluded_trial_beats_is_not_hopeless() -> None:
    table = curves(FINALS, [*(final / 2 for final in FINALS), 0.42])
    assert table.is_hopeless(8, 10.0, 1.0)
    table.exclude(3)
    assert not table.is_hopeless(8, 10.0, 1.0)


def test_where_curves_cross_only_what_is_far_behind_is_hopeless() -> None:
    scores = [0.5, 0.7, 0.3, 0.6, 0.7, 0.6, 0.4, 0.6]
    assert not curves(FINALS, [*scores, 0.4]).is_hopeless(8, 10.0, 2.0)
    assert curves(FINALS, [*scores, -2.0]).is_hopeless(8, 10.0, 2.0)


def test_a_few_complete_trials_make_nothing_hopeless_but_no_number_is() -> None:
    scores = [final / 2 for final in FINALS]
    assert not curves(FINALS[:5], [*scores[:5], 0.01]).is_hopeless(5, 10.0, 1.0)
    assert curves(FINALS[:5], [*scores[:5], math.nan]).is_hopeless(5, 10.0, 1.0)


def test_only_rungs_up_to_the_last_stopping_step_are_read() -> None:
    table = curves(FINALS, [*(final / 2 for final in FINALS), 0.1])
    table.report(8, 20, 0.9)
    assert table.is_hopeless(8, 10.0, 1.0)
