"""Fused projections and experts: every site of theirs is trained, saved, merged and exported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from tiny_models import batch_for, build, candidate_of, disturb, logits_of, state_of

from autopeft import methods
from autopeft.costs import count_trainable
from autopeft.errors import AdapterError, SpaceError
from autopeft.models.attach import attach
from autopeft.models.backbone import Backbone
from autopeft.models.export import export_merged
from autopeft.models.lora_conversion import export_lora
from autopeft.models.multi_adapter import can_share_batch
from autopeft.models.rank_cut import TrainedLora
from autopeft.models.saving import load_adapter, save_adapter
from autopeft.plan import AdapterPlan, LayerSpec
from autopeft.searcher.space.space import SearchSpace
from autopeft.testing.tiny_models import changed
from autopeft.utils.quiet import quiet_peft, quiet_transformers

_ATTENTION = {"attn.q", "attn.k", "attn.v", "attn.o"}
_EXPERTS = {"experts.gate_up", "experts.down"}
_LATENT = {"attn.kv_a", "attn.kv_b", "attn.o", "mlp.up", "mlp.gate", "mlp.down"} | _EXPERTS
_ROLES = {
    "mixtral": _ATTENTION | _EXPERTS,
    "qwen3_moe": _ATTENTION | _EXPERTS,
    "gpt_oss": _ATTENTION | _EXPERTS,
    "deepseek_v3": _LATENT | {"attn.q_a", "attn.q_b"},
    "deepseek_v2": _LATENT | {"attn.q"},
    "phi3": {"attn.qkv", "attn.o", "mlp.gate_up", "mlp.down"},
    "falcon": {"attn.qkv", "attn.o", "mlp.up", "mlp.down"},
    "falcon-40b": {"attn.qkv", "attn.o", "mlp.up", "mlp.down"},
    "mpt": {"attn.qkv", "attn.o", "mlp.up", "mlp.down"},
    "bloom": {"attn.qkv", "attn.o", "mlp.up", "mlp.down"},
}
_MISREAD = ("deepseek_v2", "deepseek_v3")
"""peft 0.21 takes `gate_proj` and `up_proj`, there those of shared experts, for routed experts."""

_TIED = ("falcon", "falcon-40b", "mpt", "bloom")


def _everywhere(backbone: Backbone, method: str) -> AdapterPlan:
    """The method at every site that it can have."""
    rank = 2 if methods.get(method).takes_rank else 0
    return AdapterPlan(
        LayerSpec(layer, role, method, rank)
        for layer in range(backbone.topology.n_layers)
        for role in backbone.topology.roles(layer)
        if role in methods.get(method).roles
    )


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "lora") for name in sorted(_ROLES)), ("gpt_oss", "ia3"), ("bloom", "oft")],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_each_site_learns_and_comes_back(name: str, method: str, tmp_path: Path) -> None:
    backbone = build(name)
    before, batch = state_of(backbone), batch_for(backbone)
    plan = _everywhere(backbone, method)
    assert {spec.role for spec in plan.specs} == _ROLES[name] & set(methods.get(method).roles)
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
    if name not in _MISREAD:
        with quiet_peft():
            theirs = peft.PeftModel.from_pretrained(build(name).model, str(tmp_path / "own"))
        assert torch.equal(logits_of(theirs.eval(), batch), logits)
    with quiet_transformers():
        merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged, batch), logits, rtol=1e-3, atol=1e-4)
    _assert_tied(name, merged)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_latent_attention_is_searched_and_only_routers_are_left_out(name: str) -> None:
    layout = build(name).layout
    assert list(layout.unsearched) == ["mlp.gate"]
    assert 0 < layout.unsearched["mlp.gate"] < 0.05
    # The shared expert is a feed-forward part like another.
    assert layout.modules[1, "mlp.up"] == ("model.layers.1.mlp.shared_experts.up_proj",)
    assert (0, "attn") not in layout.modules
    # Spaces that name queries, keys and values mean the projections that make them.
    space = SearchSpace.from_source({"methods": ["lora"]}, layout.topology)
    roles = {spec.role for c in space.baselines() for spec in c.plan.specs}
    query = "attn.q_b" if name == "deepseek_v3" else "attn.q"
    assert {query, "attn.kv_b", "attn.o"} <= roles
    assert "attn.kv_a" not in roles


def _experts(*ranks: int, roles: Sequence[str] = ("experts.gate_up", "experts.down")) -> Any:
    specs = [LayerSpec(at, role, "lora", rank) for at, rank in enumerate(ranks) for role in roles]
    return AdapterPlan([*specs, LayerSpec(1, "attn.q", "lora", 3)])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_experts_are_part_of_one_lora_for_other_programs(tmp_path: Path) -> None:
    backbone, batch = build("gpt_oss"), batch_for(build("gpt_oss"))
    with attach(backbone, candidate_of(_experts(2, 4), dropout=0.5), seed=1) as attached:
        disturb(attached, seed=7)
        logits = logits_of(attached.model, batch)
        conversion = export_lora(attached, tmp_path)
        assert conversion.factors["model.layers.1.mlp.experts.down_proj"].rank == 4
        with pytest.raises(AdapterError, match="experts are not cut to rank 3 at"):
            export_lora(attached, tmp_path / "cut", max_rank=3)
    with quiet_peft():
        theirs = peft.PeftModel.from_pretrained(build("gpt_oss").model, str(tmp_path)).eval()
    torch.testing.assert_close(logits_of(theirs, batch), logits)


def test_dropout_is_on_the_modules_beside_experts_only(tmp_path: Path) -> None:
    backbone = build("mixtral")
    with attach(backbone, candidate_of(_experts(2, 2), dropout=0.5), seed=1) as attached:
        dropouts = {
            path: float(getattr(layer.lora_dropout["default"], "p", 0.0))
            for part in attached.parts
            for path, layer in part.adapters()
        }
    assert {path.rpartition(".")[2]: share for path, share in dropouts.items()} == {
        "q_proj": 0.5,
        "gate_up_proj": 0.0,
        "down_proj": 0.0,
    }


def test_a_plan_with_one_of_the_experts_leaves_no_trace() -> None:
    backbone, batch = build("mixtral"), batch_for(build("mixtral"))
    order = [name for name, _ in backbone.model.named_parameters()]
    only = _experts(2, 2, roles=("experts.gate_up",))
    with attach(backbone, candidate_of(only), seed=1) as attached:
        logits_of(attached.model, batch)
    assert [name for name, _ in backbone.model.named_parameters()] == order


def test_the_ranks_of_experts_are_cut_like_others() -> None:
    backbone, batch = build("qwen3_moe"), batch_for(build("qwen3_moe"))
    with attach(backbone, candidate_of(_experts(4, 4)), seed=1) as attached:
        disturb(attached, seed=7)
        trained, whole = TrainedLora(attached), logits_of(attached.model, batch)
    # A cut to nothing less computes the same.
    with attach(backbone, candidate_of(_experts(4, 4)), seed=2) as attached:
        trained.cut_into(attached)
        torch.testing.assert_close(logits_of(attached.model, batch), whole, rtol=1e-4, atol=1e-5)
    (half,) = trained.cuts([2])
    assert (
        count_trainable(backbone.topology, half)
        <= count_trainable(backbone.topology, _experts(4, 4)) // 2
    )
    with attach(backbone, candidate_of(half), seed=2) as attached:
        trained.cut_into(attached)
        assert not torch.allclose(logits_of(attached.model, batch), whole)


def test_what_cannot_adapt_experts_says_so() -> None:
    backbone = build("mixtral")
    assert not can_share_batch(candidate_of(_experts(2, 2)))
    plan = AdapterPlan([LayerSpec(0, "experts.down", "ia3")])
    with pytest.raises(SpaceError, match="method 'ia3' cannot be placed at layer 0"):
        attach(backbone, candidate_of(plan), seed=1)
    too_high = AdapterPlan([LayerSpec(0, "experts.down", "lora", 33)])
    with pytest.raises(SpaceError, match="rank <= 32"):
        attach(backbone, candidate_of(too_high), seed=1)


def _assert_tied(name: str, model: Any) -> None:
    own, out = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (own is out) == (name in _TIED)
