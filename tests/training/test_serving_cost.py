"""Costs of serving: what is timed is what is served, and the model comes back as it was."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tiny_models import (
    all_specs,
    assert_same_state,
    batch_for,
    build,
    candidate_of,
    disturb,
    logits_of,
    save,
    state_of,
)

from autopeft import methods
from autopeft.errors import SettingsError
from autopeft.models.attach import attach
from autopeft.models.backbone import Backbone, load_backbone
from autopeft.plan import AdapterPlan, LayerSpec
from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.tasks.data import TaskData
from autopeft.training.measuring import Trained
from autopeft.training.serving_cost import (
    adapter_load_ms,
    as_served,
    check_generates,
    check_text,
    is_served_merged,
    serving_latency_ms,
    tokens_per_second,
)

MERGED = (LayerSpec(0, "attn.q", "lora", 2), LayerSpec(1, "mlp.down", "ia3"))
ATTACHED = (*MERGED, LayerSpec(1, "attn.o", "bottleneck", 2))
STUCK = [m.name for m in methods.all_methods() if not m.mergeable]


def _trained(base: str | Backbone, specs: Any, data: Any, **settings: Any) -> Trained:
    given = {"serving_prompt_tokens": 11, "serving_new_tokens": 5, "serving_batch_size": 2}
    backbone = build(base) if isinstance(base, str) else base
    attached = attach(backbone, candidate_of(AdapterPlan(specs)), seed=0)
    disturb(attached)
    chosen = SearchSettings(model="m", data="d", **{**given, **settings})
    return Trained(attached, data, cast(Task, None), chosen, "cpu", "fp32", 1.0)


def _watched(model: Any) -> list[Any]:
    """Note of each pass: its inputs, the types of the weights, whether an adapter is in it."""
    passes: list[Any] = []

    def note(module: Any, _: Any, inputs: Any) -> None:
        types = {p.dtype for p in module.parameters()}
        is_adapted = any(hasattr(m, "base_layer") for m in module.modules())
        passes.append(SimpleNamespace(inputs=inputs, types=types, is_adapted=is_adapted))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return passes


@pytest.mark.parametrize("specs", [MERGED, ATTACHED], ids=["merged", "attached"])
def test_the_served_model_is_timed_and_comes_back(
    specs: Any, classification_data: TaskData
) -> None:
    trained = _trained("bert", specs, classification_data)
    batch = batch_for(trained.attached.backbone)
    before, logits = state_of(trained.attached.backbone), logits_of(trained.model, batch)
    passes = _watched(trained.model)
    assert serving_latency_ms(trained) > 0
    assert {each.inputs["input_ids"].shape for each in passes} == {(2, 11)}
    assert all(each.inputs["attention_mask"].all() for each in passes)
    assert all(each.types == {torch.bfloat16} for each in passes)
    assert {each.is_adapted for each in passes} == {specs is ATTACHED}
    assert is_served_merged(trained) == (specs is MERGED)
    assert_same_state(before, state_of(trained.attached.backbone))
    assert torch.equal(logits_of(trained.model, batch), logits)


def test_tokens_are_generated_after_a_prompt_with_a_cache(causal_data: TaskData) -> None:
    trained = _trained("llama", MERGED, causal_data, serving_dtype="float32")
    passes = _watched(trained.model)
    assert tokens_per_second(trained) > 0
    widths = [each.inputs["input_ids"].shape[1] for each in passes]
    assert widths == [11, 1, 1, 1, 1] * (len(widths) // 5)
    assert all(each.types == {torch.float32} for each in passes)


@pytest.mark.parametrize("name", STUCK)
def test_what_does_not_merge_is_served_attached(name: str, causal_data: TaskData) -> None:
    backbone = build("llama")
    spec = next(s for s in all_specs(backbone.topology, (2, 4)) if s.method == name)
    trained = _trained(backbone, (spec,), causal_data)
    own = logits_of(trained.model, batch_for(backbone))
    with as_served(trained) as model, torch.inference_mode():
        served = logits_of(model, batch_for(backbone))
    torch.testing.assert_close(served.float(), own, rtol=0.1, atol=0.1)
    assert tokens_per_second(trained) > 0


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_quantized_model_is_served_with_the_adapter_attached(
    causal_data: TaskData, tmp_path: Path
) -> None:
    folder = save("llama", tmp_path, with_head=True)
    auto_class = "AutoModelForCausalLM"
    backbone = load_backbone(folder, auto_class=auto_class, quantization="bnb-4bit")
    trained = _trained(backbone, MERGED, causal_data)
    batch = batch_for(backbone)
    logits = logits_of(trained.model, batch)
    assert not is_served_merged(trained)
    assert serving_latency_ms(trained) > 0
    assert torch.equal(logits_of(trained.model, batch), logits)


def test_loading_an_adapter_leaves_the_trained_one_in_place(classification_data: TaskData) -> None:
    trained = _trained("bert", ATTACHED, classification_data)
    backbone = trained.attached.backbone
    logits = logits_of(trained.model, batch_for(backbone))
    assert adapter_load_ms(trained) > 0
    assert backbone.attached is trained.attached
    assert torch.equal(logits_of(trained.model, batch_for(backbone)), logits)


def _asked(model: str, **settings: Any) -> SearchSettings:
    return SearchSettings(model=model, data="d", **settings)


def test_prompts_longer_than_the_model_takes_are_refused(tmp_path: Path) -> None:
    model = save("llama", tmp_path, with_head=True)
    task: Any = SimpleNamespace(name="sft", auto_class="AutoModelForCausalLM")
    costs = ("trainable_params", "tokens_per_second")
    check_text(_asked(model, serving_prompt_tokens=2048), task, "cpu")
    with pytest.raises(SettingsError, match="is more than the 2048 tokens") as caught:
        check_text(_asked(model, serving_prompt_tokens=2049), task, "cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError, match="2080 tokens are more than the model's 2048"):
        check_generates(_asked(model, serving_prompt_tokens=2048, objectives=costs), task, "cpu")


def test_a_classifier_generates_nothing(tmp_path: Path) -> None:
    task: Any = SimpleNamespace(name="text-classification", auto_class="AutoModelFor...")
    with pytest.raises(SettingsError, match="which generates nothing"):
        check_generates(_asked("m"), task, "cpu")
