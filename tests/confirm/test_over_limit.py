"""What is said where every LoRA breaks a limit."""

from __future__ import annotations

from dataclasses import replace

from autopeft.confirm.finalists import Finalist, SeedScore
from autopeft.confirm.over_limit import loras_over_limits
from autopeft.confirm.verdict import judge
from autopeft.costs import Price
from autopeft.costs.constraints import parse_constraints
from autopeft.costs.objectives import objective
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.trial import Trial

LIMITS = parse_constraints(["squad.f1>=0.6", "forgetting<=0.05"])


def _candidate(rank: int) -> Candidate:
    specs = (LayerSpec(0, "attn.q", "lora", rank),) if rank else ()
    return Candidate(AdapterPlan(specs), TrainSettings(1e-3))


def _trial(rank: int, f1: float, forgetting: float, origin: str = "baseline") -> Trial:
    measured = {"squad.f1": f1, "forgetting": forgetting}
    costs = Price(rank, 4 * rank, 1.0, 1)
    return Trial(rank, _candidate(rank), costs, origin, "complete", measured=measured)


def _finalist(rank: int, f1: float) -> Finalist:
    further = {"squad.f1": f1, "forgetting": 0.0}
    score = SeedScore(0, {"loss": 1.0}, {"loss": 1.0}, (), {"loss": 1.0}, further=further)
    return Finalist(_candidate(rank), Price(rank, 4 * rank, 1.0, 1), "baseline", (score,))


def test_the_limit_and_the_best_value_are_told() -> None:
    trials = [_trial(1, 0.4, 0.0), _trial(2, 0.5, 0.0), _trial(0, 0.9, 0.0, "reference")]
    text = loras_over_limits(trials, (), LIMITS)
    assert text == "all 2 LoRA baselines break the limit squad.f1>=0.6, where the best has 0.5"
    verdict = judge((), [objective("loss"), objective("trainable_params")], no_lora=text)
    assert verdict.text == f"Undecided: no LoRA baseline was confirmed: {text}."


def test_several_limits_are_told_each() -> None:
    text = loras_over_limits([_trial(1, 0.7, 0.2), _trial(2, 0.5, 0.0)], (), LIMITS)
    assert text is not None
    assert text.endswith(
        "a limit of squad.f1>=0.6, where the best has 0.7; forgetting<=0.05, where the best has 0"
    )


def test_a_baseline_that_keeps_them_is_another_reason() -> None:
    assert loras_over_limits([_trial(1, 0.4, 0.0), _trial(2, 0.7, 0.0)], (), LIMITS) is None
    assert loras_over_limits([], (), LIMITS) is None
    assert loras_over_limits([_trial(1, 0.4, 0.0)], (), ()) is None


def test_a_measured_cost_is_told_with_its_unit() -> None:
    limits = parse_constraints(["tokens_per_second>=2000", "latency_ms<=3"])
    trials = [
        replace(_trial(rank, 0.0, 0.0), measured={"tokens_per_second": speed, "latency_ms": 2.0})
        for rank, speed in ((1, 1234.0), (2, 1000.0))
    ]
    text = loras_over_limits(trials, (), limits)
    assert text == (
        "all 2 LoRA baselines break the limit tokens_per_second>=2000, "
        "where the best has 1234 tokens/s"
    )


def test_a_finalist_breaks_a_limit_by_its_mean_whether_it_is_an_objective_or_not() -> None:
    limits = parse_constraints(["latency_ms<=3", "train_seconds<=9"])
    finalist = _finalist(1, 0.5)
    seeds = [
        replace(
            finalist.seeds[0],
            objectives={"loss": 1.0, "latency_ms": latency},
            further={"train_seconds": 8.0},
        )
        for latency in (2.0, 5.0)
    ]
    assert replace(finalist, seeds=tuple(seeds)).broken(limits) == ("latency_ms<=3",)
    assert replace(finalist, seeds=(seeds[0],)).broken(limits) == ()


def test_the_mean_over_the_seeds_counts_in_place_of_the_trial() -> None:
    text = loras_over_limits([_trial(1, 0.7, 0.0)], [_finalist(1, 0.55)], LIMITS)
    assert text == "the LoRA baseline breaks the limit squad.f1>=0.6, where the best has 0.55"
