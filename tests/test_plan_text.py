"""Plans as text: the summary that people read and the line that is read back."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.errors import SpaceError
from autopeft.plan import AdapterPlan, LayerSpec
from autopeft.plan_text import layer_ranges, plan_summary, read_plan, role_word, write_plan

ROLES = ("attn.q", "attn.k", "attn.v", "cross.q", "mlp.up", "norm", "block")
SPECS = st.builds(
    LayerSpec,
    st.integers(0, 7),
    st.sampled_from(ROLES),
    st.sampled_from(["lora", "ia3", "oft"]),
    st.sampled_from([0, 1, 4]),
)
PLANS = st.lists(SPECS, max_size=12, unique_by=lambda s: (s.layer, s.role)).map(AdapterPlan)


def parse(text: str) -> AdapterPlan:
    """Reads an exact summary back."""
    roles = {role_word(role): role for role in ROLES}
    specs = []
    for part in text.split("; "):
        method, rank, words, layers = re.fullmatch(
            r"(\w+)(?: r(\d+))? @ (\S+) in (\S+)", part
        ).groups()
        for run in layers.split(","):
            first, _, last = run.partition("-")
            for layer in range(int(first), int(last or first) + 1):
                specs += [
                    LayerSpec(layer, roles[w], method, int(rank or 0)) for w in words.split(",")
                ]
    return AdapterPlan(specs)


@given(PLANS)
def test_the_exact_summary_says_everything(plan: AdapterPlan) -> None:
    text = plan_summary(plan, max_parts=1000)
    assert text == "no adapter" if not plan.specs else parse(text) == plan


@given(PLANS)
def test_the_short_summary_is_short(plan: AdapterPlan) -> None:
    assert plan_summary(plan).count(";") <= 2


def test_summaries() -> None:
    mixed = [
        LayerSpec(layer, role, "lora", 4) for layer in (3, 4, 5) for role in ("attn.q", "attn.v")
    ]
    mixed += [LayerSpec(layer, role, "ia3") for layer in range(3) for role in ("attn.k", "attn.v")]
    assert plan_summary(AdapterPlan(mixed)) == "ia3 @ k,v in 0-2; lora r4 @ q,v in 3-5"
    uneven = [LayerSpec(i, "attn.q", "lora", 2**i) for i in range(5)]
    assert plan_summary(AdapterPlan(uneven)) == "lora r1-16 @ q in 0-4"
    holes = [*uneven, LayerSpec(7, "mlp.up", "lora", 3)]
    assert plan_summary(AdapterPlan(holes)) == "lora r1-16 @ q,up in 0-4,7 (6 sites)"
    assert layer_ranges([5, 1, 2, 0, 5]) == "0-2,5"


@given(PLANS)
def test_writing_then_reading_gives_the_plan_back(plan: AdapterPlan) -> None:
    assert read_plan(write_plan(plan)) == plan


def test_a_uniform_plan_is_one_short_line_however_deep_the_model() -> None:
    rows = [LayerSpec(n, role, "lora", 8) for n in range(80) for role in ("attn.q", "attn.v")]
    assert write_plan(AdapterPlan(rows)) == "lora:8@attn.q,attn.v[0-79]"
    assert write_plan(AdapterPlan()) == "none"


def test_damaged_text_is_refused() -> None:
    with pytest.raises(SpaceError, match="cannot be read"):
        read_plan("lora:8@attn.q")
