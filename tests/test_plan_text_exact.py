"""Tests of plans in one line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.errors import SpaceError
from autopeft.plan import AdapterPlan, LayerSpec
from autopeft.plan_text import read_plan, write_plan

specs = st.builds(
    LayerSpec,
    st.integers(0, 30),
    st.sampled_from(["attn.q", "attn.v", "mlp.gate_up", "norm"]),
    st.sampled_from(["lora", "ia3", "ln_tuning"]),
    st.integers(0, 64),
)


@given(st.lists(specs, unique_by=lambda s: (s.layer, s.role)))
def test_writing_then_reading_gives_the_plan_back(rows: list[LayerSpec]) -> None:
    plan = AdapterPlan(rows)
    assert read_plan(write_plan(plan)) == plan


def test_a_uniform_plan_is_short_however_deep_the_model() -> None:
    rows = [LayerSpec(n, role, "lora", 8) for n in range(80) for role in ("attn.q", "attn.v")]
    assert write_plan(AdapterPlan(rows)) == "lora:8@attn.q,attn.v[0-79]"
    assert write_plan(AdapterPlan()) == "none"


def test_damaged_text_is_refused() -> None:
    with pytest.raises(SpaceError, match="cannot be read"):
        read_plan("lora:8@attn.q")
