"""Which confirmations and lower ranks the time left pays for."""

from __future__ import annotations

import pytest

from autopeft.confirm.finalists import Nominee
from autopeft.costs import Price
from autopeft.engine.confirmation_plan import affordable, affordable_lower_ranks, confirmation_jobs
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.trial import Trial


def price(candidate: Candidate) -> Price:
    rank = sum(spec.rank for spec in candidate.plan.specs)
    return Price(rank, 4 * rank, 1e6, 1000)


def nominee(rank: int, origin: str = "search") -> Nominee:
    candidate = Candidate(AdapterPlan([LayerSpec(0, "attn.q", "lora", rank)]), TrainSettings(1e-3))
    return Nominee(Trial(rank, candidate, price(candidate), origin), 10.0, 1.0)


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


@pytest.mark.parametrize(("spare", "numbers"), [(100.0, [8, 16]), (6.0, [8]), (5.0, [])])
def test_lower_ranks_come_as_long_as_time_is_left(spare: float, numbers: list[int]) -> None:
    both = [nominee(8), nominee(16)]
    trained = {nominee(1).trial.digest}
    found = affordable_lower_ranks(
        both,
        worker_seconds=(40.0 + spare) / 0.9,
        n_seeds=2,
        # 4, 2 and 1 of 8: one of them has a trial.
        trained=trained if spare == 100.0 else set(),
        price=price,
    )
    assert list(found) == [n.trial.digest for n in both if n.trial.number in numbers]
    cut = [[costs.trainable_params for _, costs in rows] for rows in found.values()]
    assert cut == ([[4, 2], [8]] if spare == 100.0 else [[4, 2, 1]][: len(numbers)])


def test_each_wanted_finalist_gets_its_next_seed() -> None:
    three = [nominee(8), nominee(16), nominee(24)]
    first, second, third = (each.trial.digest for each in three)
    lower = {second: ((three[0].trial.candidate, three[0].trial.costs),)}
    begun = {(first, 1), (second, 1), (third, 1), (third, 2)}
    wanted = [second, "no nominee", first, third]
    jobs = confirmation_jobs(three, wanted, seeds=range(1, 3), begun=begun, lower_ranks=lower)
    assert [(job.costs.trainable_params, job.seed) for job in jobs] == [(16, 2), (8, 2)]
    assert [len(job.lower_ranks) for job in jobs] == [1, 0]
    assert {job.kind for job in jobs} == {"confirm"}
