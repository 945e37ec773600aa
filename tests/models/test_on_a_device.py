"""A candidate's life on an accelerator that is pretended: nothing is left on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_device import NAME, World, is_marked, pretended
from tiny_models import batch_for, build, candidate_of, logits_of, plan_of

from autopeft import methods
from autopeft.models.attach import Attached, attach
from autopeft.models.backbone import Backbone
from autopeft.models.export import export_merged
from autopeft.models.lora_conversion import export_lora
from autopeft.models.merging import merged
from autopeft.models.saving import load_attached, save_adapter
from autopeft.plan import AdapterPlan, LayerSpec

MODELS = ("bert", "distilbert", "gpt2", "llama", "t5", "vit")
KINDS = "lora pissa oft boft fourierft vblora adalora psoft prefix prompt_tuning".split()
"""Plain matrices, decompositions, rotations, indices, banks, schedules, prompts."""


def _pairs() -> list[Any]:
    """Each kind on one model, in turns; all methods on all models nightly."""
    pairs = []
    for i, method in enumerate(sorted(m.name for m in methods.all_methods())):
        for j, model in enumerate(MODELS):
            is_usual = method in KINDS and (KINDS.index(method) - j) % len(MODELS) == 0
            marks = [] if is_usual else [pytest.mark.nightly]
            if method == "shira":
                reason = "its sparse tensors cannot be pretended"
                marks.append(pytest.mark.xfail(raises=RuntimeError, reason=reason))
            pairs.append(pytest.param(method, model, marks=marks, id=f"{method}-{model}-{i}"))
    return pairs


@pytest.mark.parametrize(("method", "model"), _pairs())
def test_a_candidate_lives_on_a_device(method: str, model: str, tmp_path: Path) -> None:
    here = build(model)
    plan = plan_of(here.topology, method, seed=0)
    if plan is None:
        pytest.skip(f"{model} has no site for {method}")
    candidate = candidate_of(plan)
    with attach(here, candidate, seed=3) as attached:
        start = {n: p.detach() for n, p in attached.model.named_parameters() if p.requires_grad}
    with pretended() as world:
        backbone = _on_device(model)
        batch = {name: tensor.to(NAME) for name, tensor in batch_for(backbone).items()}
        before = torch.cuda.get_rng_state()
        with attach(backbone, candidate, seed=3) as attached:
            assert torch.equal(torch.cuda.get_rng_state(), before)
            named = dict(attached.model.named_parameters())
            assert not [n for n, p in start.items() if not torch.equal(p, named[n].detach().cpu())]
            every = [*named.items(), *attached.model.named_buffers()]
            assert not [name for name, tensor in every if not is_marked(tensor)]
            copied = _train(attached, batch, world)
            assert copied == 0
            trained = logits_of(attached.model, batch).cpu()
            save_adapter(attached, tmp_path / "own", base_model="base")
            if methods.get(method).mergeable:
                with merged(attached):
                    alone = logits_of(attached.model, batch).cpu()
                assert torch.allclose(alone, trained, rtol=1e-3, atol=1e-4)
                export_merged(attached, tmp_path / "merged")
                if method != "ln_tuning":
                    export_lora(attached, tmp_path / "lora")
        again = load_attached(_on_device(model).model, tmp_path / "own").model
        assert torch.allclose(logits_of(again, batch).cpu(), trained, rtol=1e-4, atol=1e-5)


def _on_device(model: str) -> Backbone:
    backbone = build(model)
    backbone.model.to(NAME)
    return backbone


def _train(attached: Attached, batch: dict[str, torch.Tensor], world: World) -> int:
    """Train for three steps; return how often something came from the host in the last one."""
    attached.model.train()
    parameters = [p for group in attached.parameter_groups() for p in group.parameters]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    copied = 0
    for step in range(1, 4):
        world.clear()
        with torch.autocast(NAME, torch.bfloat16, enabled=step > 1):
            loss = attached.model(**batch).loss
        if (penalty := attached.penalty()) is not None:
            loss = loss + penalty
        loss.backward()
        optimizer.step()
        copied = world.copies
        attached.after_update(step)
        optimizer.zero_grad()
    attached.model.eval()
    return copied


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_model_with_experts_trains_on_a_device(model: str) -> None:
    here = build(model)
    specs = [LayerSpec(1, role, "lora", 2) for role in ("attn.o", "experts.gate_up")]
    candidate = candidate_of(AdapterPlan(specs))
    batch = batch_for(here)
    with attach(here, candidate, seed=3) as attached:
        expected = attached.model(**batch).loss.detach()
    with pretended() as world:
        backbone = _on_device(model)
        there = {name: tensor.to(NAME) for name, tensor in batch.items()}
        with attach(backbone, candidate, seed=3) as attached:
            torch.testing.assert_close(attached.model(**there).loss.detach().cpu(), expected)
            assert _train(attached, there, world) == 0
