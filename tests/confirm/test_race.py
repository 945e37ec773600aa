"""The race: seeds go where they may decide, and the verdict pays for each look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from autopeft.confirm.finalists import Finalist
from autopeft.confirm.race import next_seeds, seeds_of
from autopeft.confirm.store import ConfirmationStore
from autopeft.confirm.verdict import judge
from tests.confirm.test_verdict import OBJECTIVES, field


def first_seeds(rows: Sequence[Finalist], *n_seeds: int) -> list[Finalist]:
    return [replace(f, seeds=f.seeds[:n]) for f, n in zip(rows, n_seeds, strict=True)]


def race(rows: Sequence[Finalist], most: int = 3) -> tuple[list[Finalist], list[Mapping[str, int]]]:
    """Return what has been trained in the end, and the looks at it."""
    looks: list[Mapping[str, int]] = []
    now = first_seeds(rows, *[1] * len(rows))
    while wanted := next_seeds(now, OBJECTIVES, usual=3, most=most, looks=looks):
        looks.append(seeds_of(now))
        n_seeds = [len(f.seeds) + (f.digest in wanted) for f in now]
        now = first_seeds(rows, *n_seeds)
    return now, looks


def test_the_better_half_gets_a_second_seed() -> None:
    members = [(0.88, 9_000), (0.60, 5_000), (0.80, 7_000), (0.60, 3_000), (0.99, 20_000)]
    rows = field(0, 0.80, members)
    wanted = next_seeds(first_seeds(rows, *[1] * 8), OBJECTIVES, usual=3, most=3)
    # The tuned LoRA, the two best that cost no more, and the pick.
    assert set(wanted) == {rows[i].digest for i in (0, 3, 5, 7)}
    assert next_seeds(first_seeds(rows, *[1] * 8), OBJECTIVES, usual=1, most=1) == ()


def test_what_is_cut_from_the_tuned_lora_takes_no_place_in_the_better_half() -> None:
    members = [(0.85, 5_000), (0.84, 4_000), (0.70, 3_000), (0.60, 2_000)]
    rows = list(field(0, 0.80, members))
    tuned = rows[0]
    for i in (3, 4):
        rows[i] = replace(rows[i], origin="compressed", compressed_from=tuned.digest)
    wanted = next_seeds(first_seeds(rows, *[1] * 7), OBJECTIVES, usual=1, most=3)
    assert wanted[:2] == (tuned.digest, rows[5].digest)
    # Two alone would tell little of the variance between trainings.
    assert len(wanted) == 3


def test_a_clear_field_is_settled_by_the_second_seed() -> None:
    rows = field(0, 0.80, [(0.90, 9_000), (0.60, 5_000), (0.60, 3_000)], small=9_500)
    now, looks = race(rows)
    assert judge(now, OBJECTIVES, looks=looks).answer == judge(rows, OBJECTIVES).answer == "yes"
    assert [len(f.seeds) for f in now] == [2, 1, 1, 2, 2, 1]


def test_a_finalist_that_cannot_be_told_from_the_tuned_lora_gets_no_more_seeds() -> None:
    # With so few rows, no number of seeds could.
    now, looks = race(field(4, 0.80, [(0.80, 9_000), (0.60, 500)], n_rows=150), most=5)
    assert judge(now, OBJECTIVES, looks=looks).answer == "undecided"
    assert max(len(f.seeds) for f in now) <= 3


def test_each_look_widens_the_intervals() -> None:
    rows = field(1, 0.80, [(0.83, 9_000), (0.81, 4_000)])
    now = seeds_of(rows)
    earlier = dict.fromkeys(now, 2)

    def width(looks: Sequence[Mapping[str, int]] | None) -> float:
        low, high = judge(rows, OBJECTIVES, looks=looks).levels[0].gain_ci
        return high - low

    assert width(None) < width([]) == width([now])
    # Earlier looks at nearly the same scores cost little.
    assert width(None) < width([earlier]) < 1.2 * width(None)


def test_the_reference_without_a_head_has_no_luck_of_the_seed() -> None:
    rows = field(3, 0.58, [(0.60, 9_000)])
    bare = replace(
        rows[2], costs=replace(rows[2].costs, trainable_params=0), seeds=rows[2].seeds[:1]
    )
    now = [*rows[:2], bare, *rows[3:]]
    assert bare.digest not in next_seeds(now, OBJECTIVES, usual=3, most=5)
    assert judge(now, OBJECTIVES).levels


@pytest.mark.slow
def test_the_intervals_hold_wherever_the_race_stops() -> None:
    n_wrong = n_trained = n_all = 0
    for seed in range(60):
        rows = field(seed, 0.80, [(0.80, 9_000), (0.80, 8_000), (0.78, 4_000)], n_rows=600)
        now, looks = race(rows)
        verdict = judge(now, OBJECTIVES, looks=looks)
        n_wrong += verdict.answer == "yes"
        n_trained += sum(len(f.seeds) for f in now)
        n_all += sum(len(f.seeds) for f in rows)
    assert n_wrong <= 6
    assert n_trained < 0.7 * n_all


def test_looks_are_kept_once(tmp_path: Path) -> None:
    store = ConfirmationStore(tmp_path)
    assert store.looks() == ()
    for look in ({"a": 1}, {"a": 2, "b": 1}, {"a": 2, "b": 1}, {"a": 3, "b": 1}):
        store.note_look(look)
    assert ConfirmationStore(tmp_path).looks() == ({"a": 2, "b": 1}, {"a": 3, "b": 1})
    assert store.done() == frozenset()
