"""The table of gaps is the same however it grew."""

from __future__ import annotations

import numpy as np
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
