from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.tasks.splitting import (
    SHARES,
    IntArray,
    spread_parts,
    stratified_parts,
    stratified_sample,
)

rows = st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abc")), min_size=1, max_size=120)


@pytest.mark.parametrize("split", [stratified_parts, spread_parts])
@given(table=rows, seed=st.integers(0, 5))
def test_parts_hold_each_row_once_and_no_key_twice(
    split: Callable[..., list[IntArray]], table: list[tuple[int, str]], seed: int
) -> None:
    keys = [key for key, _ in table]
    parts = split(keys, [s for _, s in table], [3, 1, 1], seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(table)))
    owners: dict[int, int] = {}
    for number, part in enumerate(parts):
        for row in part:
            assert owners.setdefault(keys[row], number) == number


def test_each_label_comes_in_its_share() -> None:
    labels = ["a"] * 600 + ["b"] * 300 + ["c"] * 100
    parts = stratified_parts(range(1000), labels, list(SHARES.values()), seed=1)
    for part, share in zip(parts, SHARES.values(), strict=True):
        counts = Counter(labels[i] for i in part)
        for label, total in (("a", 600), ("b", 300), ("c", 100)):
            assert counts[label] == pytest.approx(share * total, abs=1)


def test_a_lone_row_of_a_label_is_trained_on() -> None:
    labels = ["a"] * 50 + ["rare"]
    train, _, _ = stratified_parts(range(51), labels, list(SHARES.values()), seed=3)
    assert 50 in train


@given(st.integers(1, 5), st.integers(8, 30), st.integers(0, 5))
def test_small_strata_reach_every_part_and_first_the_first(
    n_each: int, n_strata: int, seed: int
) -> None:
    labels = [i % n_strata for i in range(n_strata * n_each)]
    shares = list(SHARES.values())
    parts = spread_parts(range(len(labels)), labels, shares, seed)
    for part, share in zip(parts, shares, strict=True):
        assert len(part) == pytest.approx(share * len(labels), abs=1)
    if n_each > 1:
        assert {labels[i] for i in parts[0]} == set(labels)


def test_the_seed_decides_the_parts() -> None:
    labels = ["a", "b"] * 50
    first, again, other = (
        stratified_parts(range(100), labels, [1, 1], seed)[0].tolist() for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=80), st.integers(1, 90))
def test_a_sample_is_stratified_and_nested(labels: list[str], limit: int) -> None:
    sample = stratified_sample(labels, limit, seed=2)
    assert len(sample) == min(limit, len(labels))
    assert set(sample) <= set(stratified_sample(labels, limit + 5, seed=2))
    share = labels.count("a") / len(labels)
    found = sum(labels[i] == "a" for i in sample)
    assert abs(found - share * len(sample)) <= 2
