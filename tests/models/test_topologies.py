"""Fused projections and experts: every site of theirs is trained, saved, merged and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from tiny_models import batch_for, build, candidate_of, disturb, logits_of, state_of

from autopeft import methods
from autopeft.costs import count_trainable
from autopeft.methods import LINEAR_ROLES
from autopeft.models.attach import attach
from autopeft.models.backbone import Backbone
from autopeft.models.export import export_merged
from autopeft.models.saving import load_adapter, save_adapter
from autopeft.plan import AdapterPlan, LayerSpec
from autopeft.testing.tiny_models import changed
from autopeft.utils.quiet import quiet_peft, quiet_transformers

_ATTENTION = {"attn.q", "attn.k", "attn.v", "attn.o"}
_LINEAR = {
    "mixtral": _ATTENTION,
    "qwen3_moe": _ATTENTION,
    "gpt_oss": _ATTENTION,
    "phi3": {"attn.qkv", "attn.o", "mlp.gate_up", "mlp.down"},
    "falcon": {"attn.qkv", "attn.o", "mlp.up", "mlp.down"},
    "falcon-40b": {"attn.qkv", "attn.o", "mlp.up", "mlp.down"},
    "mpt": {"attn.qkv", "attn.o", "mlp.up", "mlp.down"},
    "bloom": {"attn.qkv", "attn.o", "mlp.up", "mlp.down"},
}
_TIED = ("falcon", "falcon-40b", "mpt", "bloom")


def _everywhere(backbone: Backbone, method: str) -> AdapterPlan:
    """The method at every site of a linear module."""
    rank = 2 if methods.get(method).takes_rank else 0
    return AdapterPlan(
        LayerSpec(layer, role, method, rank)
        for layer in range(backbone.topology.n_layers)
        for role in backbone.topology.roles(layer)
        if role in methods.get(method).roles
    )


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "lora") for name in sorted(_LINEAR)), ("gpt_oss", "ia3"), ("bloom", "oft")],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_each_site_learns_and_comes_back(name: str, method: str, tmp_path: Path) -> None:
    backbone = build(name)
    before, batch = state_of(backbone), batch_for(backbone)
    plan = _everywhere(backbone, method)
    assert {spec.role for spec in plan.specs} & set(LINEAR_ROLES) == _LINEAR[name]
    with attach(backbone, candidate_of(plan), seed=1) as attached:
        disturb(attached, seed=7)
        params = [p for group in attached.parameter_groups() for p in group.parameters]
        priced = count_trainable(backbone.topology, plan)
        assert priced == sum(p.numel() for p in attached.model.parameters() if p.requires_grad)
        optimizer = torch.optim.AdamW(params, lr=1e-2)
        loss = attached.model(**batch).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in params)
        optimizer.step()
        optimizer.zero_grad()
        logits = logits_of(attached.model, batch)
        save_adapter(attached, tmp_path / "own", base_model="tiny")
        export_merged(attached, tmp_path / "merged")
    # Tied weights are still one tensor, and nothing else has changed either.
    assert changed(before, state_of(backbone)) is None
    _assert_tied(name, backbone.model)
    assert torch.equal(logits_of(load_adapter(build(name).model, tmp_path / "own"), batch), logits)
    with quiet_peft():
        theirs = peft.PeftModel.from_pretrained(build(name).model, str(tmp_path / "own")).eval()
    assert torch.equal(logits_of(theirs, batch), logits)
    with quiet_transformers():
        merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged, batch), logits, rtol=1e-3, atol=1e-4)
    _assert_tied(name, merged)


def _assert_tied(name: str, model: Any) -> None:
    own, out = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (own is out) == (name in _TIED)
