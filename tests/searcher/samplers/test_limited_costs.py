"""The chance of keeping a limit on a cost that only a worker can tell."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from autopeft.costs import PriceTable, Topology
from autopeft.costs.constraints import parse_constraints
from autopeft.costs.objectives import objective
from autopeft.searcher.samplers.bayesian import BayesianSampler
from autopeft.searcher.samplers.limited_costs import LimitedCosts
from autopeft.searcher.samplers.registry import Problem
from autopeft.searcher.space.encoding import Point
from autopeft.searcher.space.space import SearchSpace
from autopeft.trial import Trial

TOPOLOGY = Topology(6, {"attn.q": (64, 64), "attn.v": (64, 64)})
SPACE = SearchSpace.from_source({"methods": ["lora", "ia3"]}, TOPOLOGY)
PRICES = PriceTable.from_topology(TOPOLOGY)


def _points(n: int, seed: int) -> list[Point]:
    rng = np.random.default_rng(seed)
    return [SPACE.point_sampler.stratified(rng) for _ in range(n)]


def _latency(point: Point) -> float:
    """Milliseconds: each adapted site adds to them."""
    return 2.0 + len(SPACE.encoder.to_candidate(point).plan.specs)


def _trials(points: list[Point], deviation: float) -> list[Trial]:
    noise, found = np.random.default_rng(1), []
    for number, point in enumerate(points):
        candidate = SPACE.encoder.to_candidate(point)
        latency = _latency(point) * math.exp(noise.normal(0.0, deviation))
        found.append(
            Trial(
                number,
                candidate,
                PRICES.price(candidate),
                state="complete",
                values={"accuracy": 0.5 + 0.01 * len(candidate.plan.specs)},
                measured={"latency_ms": latency, "tokens_per_second": 1000.0 / latency},
            )
        )
    return found


@pytest.mark.parametrize("text", ["latency_ms<=8", "tokens_per_second>=125"])
def test_what_is_probably_within_a_limit_is_likely(text: str) -> None:
    model = LimitedCosts(SPACE, parse_constraints([text, "trainable_params<=9M"]), PRICES)
    fresh = _points(60, seed=9)
    assert (model.chance(fresh) == 1.0).all()  # Nothing is known.
    model.fit(_trials(_points(30, seed=0), deviation=0.02))
    chance = model.chance(fresh)
    latency = np.array([_latency(point) for point in fresh])
    assert (chance[latency <= 6] > 0.9).all()
    assert (chance[latency >= 11] < 0.1).all()
    assert {True, False} == set((latency <= 6).tolist())


def test_a_noisy_cost_leaves_room_on_both_sides_of_its_limit() -> None:
    spreads = []
    for deviation in (0.01, 0.5):
        model = LimitedCosts(SPACE, parse_constraints(["latency_ms<=8"]), PRICES)
        model.fit(_trials(_points(40, seed=0), deviation))
        chance = model.chance(_points(60, seed=9))
        spreads.append(float(np.mean((chance > 0.1) & (chance < 0.9))))
    assert spreads[0] < spreads[1]


def test_no_limit_and_trials_that_tell_nothing_leave_all_likely() -> None:
    points = _points(5, seed=2)
    assert (LimitedCosts(SPACE, parse_constraints(["forgetting<=1"]), PRICES).chance(points)).all()
    model = LimitedCosts(SPACE, parse_constraints(["latency_ms<=8"]), PRICES)
    model.fit([replace(trial, measured={}) for trial in _trials(_points(9, 0), 0.0)])
    assert (model.chance(points) == 1.0).all()


def test_the_sampler_keeps_to_a_limit_that_is_no_objective() -> None:
    two = (objective("accuracy"), objective("trainable_params"))
    shares = []
    for texts in ([], ["latency_ms<=8"]):
        limits = parse_constraints(texts)
        rows = [
            replace(
                trial,
                values={**trial.values, "trainable_params": trial.costs.trainable_params},
                broken=tuple(c.text for c in limits if c.excess(trial.measured) > 0),
            )
            for trial in _trials(_points(30, seed=0), deviation=0.02)
        ]
        sampler = BayesianSampler(Problem(SPACE, two, PRICES, limits, seed=0))
        proposed = []
        for _ in range(8):
            point = sampler.propose(rows)
            proposed.append(_latency(point))
            trial = _trials([point], 0.0)[0]
            rows.append(replace(trial, number=len(rows), state="running", values={}, measured={}))
        shares.append(np.mean(np.array(proposed) > 8))
    assert shares[1] < shares[0]
    assert shares[1] <= 0.25
