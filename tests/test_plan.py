"""Plans and candidates: one identity however written, JSON both ways."""

from __future__ import annotations

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
def test_the_order_of_the_rows_does_not_matter(rows, random) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert AdapterPlan(shuffled) == AdapterPlan(rows)
    assert AdapterPlan(shuffled).digest == AdapterPlan(rows).digest


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
def test_a_damaged_row_is_refused(row) -> None:
    with pytest.raises(SpaceError):
        AdapterPlan.from_json([row])


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
