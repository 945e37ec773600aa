"""Which confirmations and cuts the time left pays for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopeft.confirm.finalists import Nominee
from autopeft.costs import Price
from autopeft.engine.confirmation_plan import affordable, affordable_cuts, confirmation_jobs
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.trial import Trial


def price(candidate: Candidate) -> Price:
    rank = sum(spec.rank for spec in candidate.plan.specs)
    return Price(rank, 4 * rank, 1e6, 1000)


def nominee(rank: int, origin: str = "search") -> Nominee:
    candidate = Candidate(AdapterPlan([LayerSpec(0, "attn.q", "lora", rank)]), TrainSettings(1e-3))
    return Nominee(Trial(rank, candidate, price(candidate), origin), 10.0, 1.0)


NO_PLAN = Candidate(AdapterPlan(), TrainSettings(1e-3))
NOMINEES = [
    nominee(1, "baseline"),
    nominee(2, "reference"),
    *(nominee(8 * i) for i in (1, 2, 3, 4)),
]


@pytest.mark.parametrize(
    ("seconds", "ranks"),
    [
        (120.0, [1, 2, 8, 16, 24, 32]),
        (119.0, [1, 2, 8, 16, 32]),
        (99.0, [1, 2, 8, 32]),
        (1.0, [1, 2, 8, 32]),
    ],
)
def test_front_members_are_dropped_from_the_middle(seconds: float, ranks: list[int]) -> None:
    kept = affordable(NOMINEES, worker_seconds=seconds, n_seeds=2)
    assert [n.trial.number for n in kept] == ranks


def test_what_is_confirmed_takes_no_time_and_is_not_dropped() -> None:
    begun = [replace(n, n_begun=1) if n in NOMINEES[2:5] else n for n in NOMINEES]
    for seconds in (1.0, 100.0, 1e3):
        kept = affordable(begun, worker_seconds=seconds, n_seeds=2)
        assert {n.trial.number for n in NOMINEES[2:5]} <= {n.trial.number for n in kept}
    fewer = affordable(NOMINEES, worker_seconds=50.0, n_seeds=2)
    assert len(affordable(begun, worker_seconds=50.0, n_seeds=2)) > len(fewer)
    done = [replace(n, n_begun=2) for n in NOMINEES]
    assert affordable(done, worker_seconds=0.0, n_seeds=2) == tuple(done)


@pytest.mark.parametrize(("spare", "numbers"), [(12.0, [8, 16]), (11.0, [8]), (5.0, [])])
def test_loras_are_cut_as_long_as_time_is_left(spare: float, numbers: list[int]) -> None:
    plan = AdapterPlan([LayerSpec(0, "attn.q", "ia3")])
    other = Nominee(Trial(1, Candidate(plan, TrainSettings(1e-3)), price(NO_PLAN), "search"), 10, 1)
    nominees = [other, nominee(8), nominee(16)]
    seconds = (60.0 + spare + 1e-6) / 0.9  # Each cut into three takes 3 seconds a seed.
    found = affordable_cuts(nominees, worker_seconds=seconds, n_seeds=2)
    assert found == {n.trial.digest for n in nominees if n.trial.number in numbers}


def test_each_wanted_finalist_gets_its_next_seed() -> None:
    three = [nominee(8), nominee(16), nominee(24)]
    first, second, third = (each.trial.digest for each in three)
    cuts = {second: [nominee(2).trial.candidate]}
    begun = {(first, 1), (second, 1), (third, 1), (third, 2)}
    wanted = [second, "no nominee", first, third]
    jobs = confirmation_jobs(
        three, wanted, seeds=range(1, 3), begun=begun, to_cut={first, second}, cuts=cuts
    )
    assert [(job.costs.trainable_params, job.seed) for job in jobs] == [(16, 2), (8, 2)]
    # The second seed is cut as the first was; where that one was not cut, this one decides.
    assert [(job.compress, job.cuts) for job in jobs] == [(True, tuple(cuts[second])), (True, ())]
    assert {job.kind for job in jobs} == {"confirm"}
    (job,) = confirmation_jobs(three, [second], seeds=[3], begun=begun, cuts=cuts)
    assert not job.compress
    assert not job.cuts
