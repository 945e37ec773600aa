"""Plans as one line of text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.errors import SpaceError
from autopeft.plan import ROLES, AdapterPlan, LayerSpec
from autopeft.plan_text import (
    layer_ranges,
    plan_summary,
    read_plan,
    role_word,
    unsearched_text,
    write_plan,
)

SPECS = st.builds(
    LayerSpec,
    st.integers(0, 30),
    st.sampled_from(ROLES),
    st.sampled_from(["lora", "ia3", "ln_tuning"]),
    st.sampled_from([0, 1, 4, 64]),
)
PLANS = st.lists(SPECS, max_size=12, unique_by=lambda s: (s.layer, s.role)).map(AdapterPlan)


@given(PLANS)
def test_the_exact_forms_read_back(plan: AdapterPlan) -> None:
    assert read_plan(write_plan(plan)) == plan
    assert read_plan(plan_summary(plan, max_parts=1000)) == plan


@given(PLANS)
def test_the_short_summary_is_short(plan: AdapterPlan) -> None:
    assert plan_summary(plan).count(";") <= 2


def test_examples() -> None:
    mixed = [
        LayerSpec(layer, role, "lora", 4) for layer in (3, 4, 5) for role in ("attn.q", "attn.v")
    ]
    mixed += [LayerSpec(layer, role, "ia3") for layer in range(3) for role in ("attn.k", "attn.v")]
    assert plan_summary(AdapterPlan(mixed)) == "ia3 @ k,v in 0-2; lora r4 @ q,v in 3-5"
    uneven = [LayerSpec(i, "attn.q", "lora", 2**i) for i in range(5)]
    assert plan_summary(AdapterPlan(uneven)) == "lora r1-16 @ q in 0-4"
    holes = [*uneven, LayerSpec(7, "mlp.up", "lora", 3)]
    assert plan_summary(AdapterPlan(holes)) == "lora r1-16 @ q,up in 0-4,7 (6 sites)"
    prefix = [LayerSpec(i, "attn", "prefix", 8) for i in range(2)]
    assert plan_summary(AdapterPlan(prefix)) == "prefix r8 @ attn in 0-1"
    assert plan_summary(AdapterPlan()) == "no adapter"
    assert layer_ranges([5, 1, 2, 0, 5]) == "0-2,5"


def test_every_role_has_its_own_word() -> None:
    words = {role_word(role) for role in ROLES}
    assert len(words) == len(ROLES)
    assert all(words)


def test_a_uniform_plan_is_short_however_deep_the_model() -> None:
    rows = [LayerSpec(n, role, "lora", 8) for n in range(80) for role in ("attn.q", "attn.v")]
    assert write_plan(AdapterPlan(rows)) == "lora:8@attn.q,attn.v[0-79]"
    assert write_plan(AdapterPlan()) == "none"


def test_what_has_no_role_is_named_with_the_largest_first() -> None:
    shares = {f"mlp.experts.{i}": 0.1 for i in range(8)} | {"mlp.gate": 0.004}
    text = unsearched_text(shares, max_parts=2)
    assert text == (
        "80% of the blocks' parameters get no adapter: mlp.experts.0 (10%), "
        "mlp.experts.1 (10%), 7 more"
    )
    assert unsearched_text({"mlp.gate": 0.0005}) == unsearched_text({}) == ""


def test_experts_outside_the_space_come_with_what_to_do() -> None:
    shares = {"experts.gate_up": 0.6, "experts.down": 0.3, "mlp.gate": 0.004}
    assert unsearched_text(shares) == (
        "90% of the blocks' parameters get no adapter: experts.gate_up (60%), experts.down (30%), "
        "mlp.gate (0.4%); a space with experts: [experts.gate_up, experts.down] among its "
        "placements gives them a LoRA"
    )


@pytest.mark.parametrize(
    "text", ["lora:8@attn.q", "lora r1-8 @ q in 0-4 (6 sites)", "lora @ q in x"]
)
def test_damaged_text_is_refused(text: str) -> None:
    with pytest.raises(SpaceError, match="cannot be read"):
        read_plan(text)


@pytest.mark.parametrize(
    "text",
    [
        "lora:8@attn.q[0-999999999]",
        "lora:8@attn.q[0-99999]",
        "lora:8@attn.q[5-3]",
        "lora:8@attn.q[1-2-3]",
        "lora:8@attn.q[,]",
        "lora:8@attn.q[²]",
        "lora:99999999999@attn.q[0]",
        "lora:999999999@attn.q[0]",
    ],
)
def test_a_plan_of_too_many_blocks_is_refused_before_it_is_written_out(text: str) -> None:
    with pytest.raises(SpaceError):
        read_plan(text)
