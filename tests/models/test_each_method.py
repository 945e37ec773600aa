"""Each method alone, at random sites of unlike models: price, start, gradients, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from covering import ARCHITECTURES, covering
from tiny_models import (
    assert_same_state,
    batch_for,
    build,
    candidate_of,
    disturb,
    logits_of,
    plan_of,
    prompt_sizes_of,
    state_of,
)
from torch.utils.flop_counter import FlopCounterMode

from autopeft import methods
from autopeft.costs import PriceTable
from autopeft.models.attach import attach
from autopeft.models.backbone import Backbone
from autopeft.models.saving import load_attached, save_adapter
from autopeft.plan import AdapterPlan
from autopeft.profiling.counters import run_and_count
from autopeft.profiling.measure import price_table

_ROWS, _LENGTH = 3, 14
_BACKBONES: dict[str, Backbone] = {}
_TABLES: dict[tuple[str, tuple[int, ...]], PriceTable] = {}


def _backbone(name: str) -> Backbone:
    if name not in _BACKBONES:
        _BACKBONES[name] = build(name)
    return _BACKBONES[name]


def _table(name: str, prompt_sizes: tuple[int, ...]) -> PriceTable:
    if (name, prompt_sizes) not in _TABLES:
        _TABLES[name, prompt_sizes] = price_table(
            build(name, device="meta"),
            batch_size=_ROWS,
            mean_length=_LENGTH,
            longest_length=_LENGTH,
            prompt_sizes=prompt_sizes,
        )
    return _TABLES[name, prompt_sizes]


@pytest.mark.parametrize(
    ("method", "name"), covering([m.name for m in methods.all_methods()], ARCHITECTURES, each=3)
)
def test_a_method_keeps_its_word(method: str, name: str, tmp_path: Path) -> None:
    backbone = _backbone(name)
    described = methods.get(method)
    plan = plan_of(backbone.topology, method, seed=len(method) + len(name))
    if plan is None:
        pytest.skip(f"{name} has no site for {method}")
    candidate = candidate_of(plan, batch_size=_ROWS)
    table = _table(name, prompt_sizes_of(plan))
    batch = batch_for(backbone, rows=_ROWS, length=_LENGTH)
    before = state_of(backbone)
    with attach(backbone, candidate_of(AdapterPlan()), seed=3) as attached:
        base = logits_of(attached.model, batch)
    with attach(backbone, candidate, seed=3) as attached:
        first = logits_of(attached.model, batch)
        if described.starts_at_identity and described.exact_start:
            assert torch.equal(first, base)
        elif described.starts_at_identity:
            torch.testing.assert_close(first, base, rtol=1e-3, atol=1e-4)

        attached.model.train()
        live = {n: p for n, p in attached.model.named_parameters() if p.requires_grad}
        assert table.price(candidate).trainable_params == sum(p.numel() for p in live.values())
        disturb(attached)
        with FlopCounterMode(display=False) as counter:
            attached.model(**batch).loss.backward()
        assert [n for n, p in live.items() if p.grad is None] == []
        assert [n for n, p in live.items() if not torch.isfinite(p.grad).all()] == []
        assert table.price(candidate).train_flops == pytest.approx(
            counter.get_total_flops(), rel=0.02
        )
        run = run_and_count(lambda: attached.model(**batch).loss, not_kept=attached.model)
        assert table.saved_bytes(candidate) == pytest.approx(run.saved_bytes, rel=0.10)

        with torch.autocast("cpu", torch.bfloat16):
            loss = attached.model(**batch).loss
        assert torch.isfinite(loss)

        attached.model.eval()
        after = logits_of(attached.model, batch)
        assert not torch.allclose(after, base, atol=1e-5)
        save_adapter(attached, tmp_path / "adapter", base_model="base")
    assert_same_state(before, state_of(backbone))
    reloaded = load_attached(build(name).model, tmp_path / "adapter")
    again = logits_of(reloaded.model, batch)
    if described.changes_base:  # The rest of the weight is computed anew from the base.
        torch.testing.assert_close(again, after, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(again, after)
