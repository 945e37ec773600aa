"""Prompts in training: tasks know nothing of them, and nothing below them is frozen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from training_samples import VOCABULARY, tiny_bert
from transformers import LlamaConfig, LlamaForCausalLM

from autopeft.models.attach import attach
from autopeft.models.backbone import Backbone
from autopeft.plan import MODEL, AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.tasks.batch import collate
from autopeft.tasks.data import IGNORED, TaskData
from autopeft.tasks.sft import SupervisedFineTuning
from autopeft.tasks.text_classification import TextClassification
from autopeft.training.acceleration import NO_ACCELERATION
from autopeft.training.activation_cache import ActivationCache
from autopeft.training.precision import Precision
from autopeft.training.setup import TrainingSetup
from autopeft.training.trainer import Trainer

_PROMPT = LayerSpec(0, MODEL, "prompt_tuning", 4)


def _bert() -> Backbone:
    return Backbone(tiny_bert(), head=("classifier",))


def _llama() -> Backbone:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return Backbone(LlamaForCausalLM(config).eval())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["classification", "causal"])
def test_a_task_learns_with_a_prompt_as_with_any_adapter(
    kind: str, precision: Precision, classification_data: TaskData, causal_data: TaskData
) -> None:
    is_causal = kind == "causal"
    data = causal_data if is_causal else classification_data
    task: Any = SupervisedFineTuning() if is_causal else TextClassification(data.labels, 0)
    train = TrainSettings(3e-2, steps=25)
    backbone = _llama() if is_causal else _bert()
    with attach(backbone, Candidate(AdapterPlan([_PROMPT]), train), seed=0) as attached:
        training = Trainer(attached, TrainingSetup(task, data, precision=precision), train, seed=0)
        before = training.evaluate("validation").loss
        (prompt,) = attached.parameter_groups()[0].parameters
        start = prompt.detach().clone()
        reports = [training.advance(step) for step in (25,)]
        assert reports[-1].loss < before
        assert not torch.equal(prompt, start)


def test_the_completion_is_scored_at_its_own_tokens(causal_data: TaskData) -> None:
    candidate = Candidate(AdapterPlan([_PROMPT]), TrainSettings(1e-2))
    with attach(_llama(), candidate, seed=0) as attached:
        batch = collate(causal_data, "validation", np.arange(5))
        loss = SupervisedFineTuning().loss(attached.model, batch)
        with torch.no_grad():
            logits = attached.model(**batch.model_inputs()).logits
    total, n = 0.0, 0
    for row, column in (batch.labels != IGNORED).nonzero().tolist():
        total -= float(logits[row, column - 1].log_softmax(-1)[batch.input_ids[row, column]])
        n += 1
    assert float(loss.detach()) == pytest.approx(total / n, rel=1e-4)


def test_nothing_is_cached_below_a_prompt(classification_data: TaskData) -> None:
    plan = AdapterPlan([_PROMPT, LayerSpec(2, "attn.q", "lora", 2)])
    backbone = _bert()
    cache = ActivationCache(backbone.model, backbone.layout.blocks, classification_data)
    assert plan.lowest_layer == 0
    assert cache.below(plan.lowest_layer) is NO_ACCELERATION


def test_states_cached_for_others_are_not_served_to_a_prompt(classification_data: TaskData) -> None:
    task = TextClassification(classification_data.labels, 0)
    train = TrainSettings(1e-2, steps=4)
    above = AdapterPlan([LayerSpec(2, "attn.q", "lora", 2)])
    backbone = _bert()
    cache = ActivationCache(backbone.model, backbone.layout.blocks, classification_data)

    def loss(plan: AdapterPlan) -> float:
        with attach(backbone, Candidate(plan, train), seed=0) as attached:
            below = cache.below(plan.lowest_layer)
            setup = TrainingSetup(task, classification_data, cache=below)
            training = Trainer(attached, setup, train, seed=0)
            return [training.advance(step) for step in (4,)][-1].loss

    first = loss(AdapterPlan([_PROMPT]))
    cached = loss(above)
    assert cache.setup_seconds > 0
    assert loss(AdapterPlan([_PROMPT])) == first
    assert loss(above) == pytest.approx(cached, rel=1e-4)
