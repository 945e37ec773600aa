"""Tests of the parameters of a trial that people plot."""

from __future__ import annotations

import numpy as np
import pytest

from autopeft.costs import Topology
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.searcher.space.readable import ReadableParams
from autopeft.searcher.space.space import SearchSpace

TOPOLOGY = Topology(
    4, {"attn.q": (16, 16), "attn.v": (16, 16), "mlp.up": (32, 16), "norm": (16, 4)}, head_params=34
)
ALL = ("learning_rate", "method", "rank", "adapted_blocks", "lowest_block", "modules")


def space(**changes: object) -> SearchSpace:
    return SearchSpace.from_source({"methods": ["lora", "ia3", "ln_tuning"], **changes}, TOPOLOGY)


def test_every_candidate_of_a_space_has_all_parameters_within_bounds() -> None:
    searched = space(alpha_ratio=[1, 2], dropout=[0.0, 0.1])
    readable, rng = ReadableParams(searched), np.random.default_rng(0)
    draws = [searched.sample(rng) for _ in range(50)]
    draws += [*searched.baselines(), *searched.portfolio(), searched.reference()]
    for candidate in draws:
        assert set(readable.of(candidate)) == {*ALL, "alpha_ratio", "dropout"}
    assert set(ReadableParams(space()).parameters) == set(ALL)  # what cannot vary is left out


def test_parameters_say_what_the_plan_is() -> None:
    readable = ReadableParams(space())
    specs = [LayerSpec(2, "attn.q", "lora", 2), LayerSpec(3, "attn.v", "lora", 4)]
    plan = AdapterPlan([*specs, LayerSpec(3, "mlp.up", "ia3")])
    assert readable.of(Candidate(plan, TrainSettings(1e-3))) == {
        "learning_rate": 1e-3,
        "method": "mixed",
        "rank": 4,
        "adapted_blocks": 2,
        "lowest_block": 2,
        "modules": "attention+mlp",
    }
    empty = readable.of(Candidate(AdapterPlan(), TrainSettings(1e-3)))
    assert (empty["method"], empty["modules"]) == ("none", "none")
    assert (empty["rank"], empty["adapted_blocks"], empty["lowest_block"]) == (0, 0, 4)


@pytest.mark.parametrize(
    ("specs", "rate", "missing"),
    [
        ([LayerSpec(0, "attn.q", "dora", 4)], 1e-3, {"method"}),
        ([LayerSpec(0, "attn.q", "lora", 512)], 1e-3, {"rank"}),
        ([LayerSpec(0, "attn.q", "lora", 4)], 100.0, {"learning_rate"}),
    ],
)
def test_a_value_outside_its_bounds_is_left_out(
    specs: list[LayerSpec], rate: float, missing: set[str]
) -> None:
    candidate = Candidate(AdapterPlan(specs), TrainSettings(rate))
    assert set(ReadableParams(space()).of(candidate)) == set(ALL) - missing


def test_a_space_without_ranks_has_no_rank() -> None:
    readable = ReadableParams(space(methods=["ia3"]))
    assert "rank" not in readable.parameters
    assert readable.parameters["method"]["choices"] == ["none", "ia3"]
