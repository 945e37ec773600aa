import math
import random
from dataclasses import replace

import pytest
from report_samples import candidate, finalist, lora, trial

from autopeft.confirm.finalists import Finalist
from autopeft.confirm.intervals import cost_interval, quality_interval
from autopeft.costs.objectives import UNBOUNDED, Objective, objective

ACCURACY = objective("accuracy")


def made(seeds: int, n_rows: int = 400, shift: float = 0.0) -> Finalist:
    return finalist(trial(0, candidate(lora(range(6), 2))), seeds, shift, n_rows)


def test_one_seed_gives_the_binomial_interval() -> None:
    one = made(1)
    mean = one.seeds[0].test["accuracy"]
    low, high = quality_interval(one, ACCURACY)
    half = 1.966 * math.sqrt(mean * (1 - mean) / 399)  # t with 399 degrees of freedom
    assert high - mean == pytest.approx(half, rel=1e-3)
    assert mean - low == pytest.approx(half, rel=1e-3)


def test_more_rows_tell_more() -> None:
    widths = [
        (lambda i: i[1] - i[0])(quality_interval(made(3, n), ACCURACY)) for n in (50, 400, 3000)
    ]
    assert widths == sorted(widths, reverse=True)


def test_all_rows_right_is_not_certainty() -> None:
    low, high = quality_interval(made(3, 100, shift=0.5), ACCURACY)
    assert high == 1.0
    assert 0.9 < low < 0.99


def test_a_metric_that_is_no_row_mean_has_the_seeds_alone() -> None:
    done = made(3)
    seeds = tuple(replace(s, test={"f1": 0.6 + 0.01 * s.seed}) for s in done.seeds)
    low, high = quality_interval(replace(done, seeds=seeds), objective("f1"))
    assert (low + high) / 2 == pytest.approx(0.61)
    assert high - low == pytest.approx(2 * 4.3027 * 0.01 / math.sqrt(3), rel=1e-3)
    assert quality_interval(replace(done, seeds=seeds[:1]), objective("f1")) is None


def test_perplexity_scales_the_rows_error() -> None:
    done = made(1)
    rng = random.Random(0)
    rows = tuple(-rng.gauss(2.0, 0.5) for _ in range(400))
    loss = -sum(rows) / 400
    seed = replace(done.seeds[0], test={"loss": loss, "perplexity": math.exp(loss)}, test_rows=rows)
    one = replace(done, seeds=(seed,))
    low, high = quality_interval(one, objective("loss"))
    wide_low, wide_high = quality_interval(one, objective("perplexity"))
    assert (wide_high - wide_low) == pytest.approx((high - low) * math.exp(loss))


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = random.Random(1)
    hits = 0
    for _ in range(200):
        seeds = []
        for seed, one in enumerate(made(3, 60).seeds):
            rows = tuple(float(rng.random() < 0.7) for _ in range(60))
            seeds.append(replace(one, seed=seed, test={"accuracy": sum(rows) / 60}, test_rows=rows))
        low, high = quality_interval(replace(made(3, 60), seeds=tuple(seeds)), ACCURACY)
        hits += low <= 0.7 <= high
    assert hits >= 190


def test_cost_needs_two_measurements() -> None:
    assert cost_interval([3.0]) is None
    assert cost_interval([3.0, 3.0]) == (3.0, 3.0)
    low, high = cost_interval([3.0, 5.0])
    assert low < 3.0 < 5.0 < high


def test_a_metric_on_resamples_has_their_spread_and_that_of_the_seeds() -> None:
    done = made(3)
    rng = random.Random(0)
    draws = [rng.gauss(0.6, 0.02) for _ in range(2000)]
    seeds = tuple(
        replace(s, test={"f1": 0.6}, test_draws=tuple(d for d in draws)) for s in done.seeds
    )
    low, high = quality_interval(replace(done, seeds=seeds), objective("f1"))
    assert (low + high) / 2 == pytest.approx(0.6)
    assert high - low == pytest.approx(2 * 1.96 * 0.02, rel=0.05)
    one = quality_interval(replace(done, seeds=seeds[:1]), objective("f1"))
    assert one == pytest.approx((low, high), rel=0.02)


def test_no_interval_goes_beyond_what_its_value_can_be() -> None:
    done = made(3)
    f1 = Objective("f1", "maximize", bounds=(0.0, 1.0))
    seeds = tuple(replace(s, test={"f1": 0.99 - 0.04 * s.seed}) for s in done.seeds)
    low, high = quality_interval(replace(done, seeds=seeds), f1)
    assert 0.0 < low < 0.9
    assert high == 1.0
    draws = replace(done, seeds=tuple(replace(s, test_draws=(0.6, 1.0, 1.0)) for s in seeds))
    assert quality_interval(draws, f1)[1] == 1.0
    assert quality_interval(replace(done, seeds=seeds), replace(f1, bounds=UNBOUNDED))[1] > 1.0
    assert cost_interval([0.1, 3.0])[0] == 0.0
