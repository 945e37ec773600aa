"""Plans and candidates: one identity however written, JSON both ways."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.errors import SpaceError
from autopeft.plan import ROLES, AdapterPlan, Candidate, LayerSpec, TrainSettings

specs = st.builds(
    LayerSpec,
    st.integers(0, 40),
    st.sampled_from(ROLES),
    st.sampled_from(["lora", "ia3", "none"]),
    st.integers(0, 64),
)
plans = st.lists(specs, max_size=12, unique_by=lambda s: (s.layer, s.role)).map(AdapterPlan)


@given(plans)
def test_a_plan_survives_json(plan: AdapterPlan) -> None:
    again = AdapterPlan.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest


@given(st.lists(specs, max_size=8, unique_by=lambda s: (s.layer, s.role)), st.randoms())
def test_the_order_of_the_rows_does_not_matter(rows: list[LayerSpec], random: Random) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert AdapterPlan(shuffled) == AdapterPlan(rows)
    assert AdapterPlan(shuffled).digest == AdapterPlan(rows).digest


def test_digests_never_change() -> None:
    """Folders, studies and front.json of earlier versions hold these digests."""
    plan = AdapterPlan([LayerSpec(1, "mlp.down", "ia3"), LayerSpec(0, "attn.q", "lora", 4)])
    rates = (("lora", 1e-3), ("ia3", 1e-16))
    train = TrainSettings(3e-4, rates, alpha_ratio=1.5, dropout=0.1, steps=90, batch_size=8)
    assert AdapterPlan().digest == "4f53cda18c2baa0c"
    assert plan.digest == "53e15b79e49a02a0"
    assert Candidate(plan, train).digest == "667516c76885ed12"
    assert Candidate(plan, TrainSettings(1e-3)).digest == "203d791b96450149"
    assert Candidate(AdapterPlan(), TrainSettings(1e16, alpha_ratio=2)).digest == "b5722786373910cb"


def test_a_candidate_read_back_has_the_digest_it_was_saved_with() -> None:
    candidate = Candidate(AdapterPlan(), TrainSettings(1e16, alpha_ratio=2))
    again = Candidate.from_json(json.loads(json.dumps(candidate.to_json())))
    assert again.digest == candidate.digest


def test_a_fixed_alpha_is_part_of_the_identity_and_a_missing_one_is_not_written() -> None:
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 4)])
    free, fixed = (Candidate(plan, TrainSettings(1e-3, alpha=alpha)) for alpha in (None, 16.0))
    assert "alpha" not in free.to_json()["train"]
    assert free.digest != fixed.digest
    assert Candidate.from_json(json.loads(json.dumps(fixed.to_json()))).digest == fixed.digest
    assert [free.train.alpha_for(rank) for rank in (2, 8)] == [4.0, 16.0]
    assert [fixed.train.alpha_for(rank) for rank in (2, 8)] == [16.0, 16.0]
    with pytest.raises(SpaceError, match="alpha"):
        TrainSettings(1e-3, alpha=0.0)


def test_none_is_no_adapter() -> None:
    spec = LayerSpec(0, "attn.q", "lora", 4)
    assert AdapterPlan([spec, LayerSpec(1, "attn.q", "none")]) == AdapterPlan([spec])
    assert AdapterPlan([]).lowest_layer is None


def test_different_plans_have_different_digests() -> None:
    digests = {
        AdapterPlan([LayerSpec(layer, role, "lora", rank)]).digest
        for layer in range(4)
        for role in ("attn.q", "attn.v")
        for rank in (1, 2, 4)
    }
    assert len(digests) == 24


def test_a_site_holds_one_adapter() -> None:
    with pytest.raises(SpaceError, match=r"layer 0 \(attn\.q\)"):
        AdapterPlan([LayerSpec(0, "attn.q", "lora", 4), LayerSpec(0, "attn.q", "ia3")])


@pytest.mark.parametrize(
    "row",
    [
        {"layer": 0, "role": "attn.q"},
        {"layer": 0, "role": "attn.q", "method": "lora", "rank": 4, "extra": 1},
        {"layer": "0", "role": "attn.q", "method": "lora"},
        {"layer": True, "role": "attn.q", "method": "lora"},
        {"layer": 0, "role": "attn.q", "method": "lora", "rank": 1.5},
        {"layer": 0, "role": "nowhere", "method": "lora", "rank": 1},
        {"layer": -1, "role": "attn.q", "method": "lora", "rank": 1},
        "not a row",
    ],
)
def test_a_damaged_row_is_refused(row: Any) -> None:
    with pytest.raises(SpaceError):
        AdapterPlan.from_json([row])


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({}, "train={}: lacks the key `learning_rate`"),
        (None, "train=None: must be a mapping"),
        ({"learning_rate": "fast"}, "train.learning_rate='fast': must be a number"),
        ({"learning_rate": 1e-3, "steps": 1.5}, r"train.steps=1.5: must be a whole number"),
        ({"learning_rate": 1e-3, "stepz": 1}, "train.stepz=1: unknown key; did you mean 'steps'"),
        ({"learning_rate": 1e-3, "method_rates": {"lora": "x"}}, "must be a number"),
        ({"learning_rate": 1e-3, "method_rates": 5}, "must be a list"),
    ],
)
def test_damaged_train_settings_are_refused(train: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        Candidate.from_json({"plan": [], "train": train})


def test_a_candidate_is_its_plan_and_its_training() -> None:
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 4)])
    first = Candidate(plan, TrainSettings(1e-3, (("lora", 1e-3), ("head", 1e-4))))
    same = Candidate(plan, TrainSettings(1e-3, (("head", 1e-4), ("lora", 1e-3))))
    other = Candidate(plan, TrainSettings(2e-3))
    assert first == same
    assert first.digest == same.digest
    assert first.digest != other.digest
    assert Candidate.from_json(first.to_json()) == first


def test_each_method_has_its_rate() -> None:
    train = TrainSettings(1e-3, (("ia3", 1e-2),))
    assert train.rate_for("ia3") == 1e-2
    assert train.rate_for("lora") == 1e-3


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_rate_is_refused(rate: float) -> None:
    with pytest.raises(SpaceError, match="learning_rate"):
        TrainSettings(rate)
