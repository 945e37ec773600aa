"""Packed rows have the losses and gradients of padded ones."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import candidate_of, disturb, plan_of
from training_samples import VOCABULARY, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from autopeft.models.attach import Attached, attach
from autopeft.models.backbone import Backbone
from autopeft.models.loading import prepare_config
from autopeft.plan import AdapterPlan
from autopeft.profiling.output_positions import narrow_modules
from autopeft.tasks.data import TaskData
from autopeft.tasks.sft import SupervisedFineTuning
from autopeft.training.activation_cache import ActivationCache
from autopeft.training.last_block import LastBlock
from autopeft.training.packing import Packing
from autopeft.training.precision import Precision
from autopeft.training.setup import TrainingSetup
from autopeft.training.trainer import Trainer, train_adapters_only


def _backbone(kind: str) -> Backbone:
    model: Any = tiny_llama(3)
    if kind == "gpt2":
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}
        config = GPT2Config(vocab_size=VOCABULARY, **sizes, bos_token_id=1, eos_token_id=3)
        model = GPT2LMHeadModel(config)
    prepare_config(model.config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return Backbone(model.eval(), auto_class="AutoModelForCausalLM")


def _setup(
    backbone: Backbone, data: TaskData, attached: Attached, precision: Precision
) -> TrainingSetup:
    task, layout = SupervisedFineTuning(), backbone.layout
    cache = ActivationCache(backbone.model, layout.blocks, data, precision=precision)
    modules = narrow_modules(backbone.model, layout)
    last = LastBlock(
        backbone.model, layout.blocks[-1], modules, task, "completion", precision=precision
    )
    below = cache.below(attached.candidate.plan.lowest_layer)
    return TrainingSetup(task, data, precision=precision, cache=below, last_block=last)


def _first_step(attached: Attached, setup: TrainingSetup) -> tuple[int, float, list[torch.Tensor]]:
    """Return the tokens of the first step, its loss and its gradients."""
    train = replace(attached.candidate.train, batch_size=12)
    training = Trainer(attached, setup, train, seed=0)
    train_adapters_only(attached.model)
    attached.model.zero_grad()
    rows = np.arange(12, dtype=np.int64)
    n_tokens = training._batch(rows).input_ids.numel()
    loss = float(training._backward([rows]))
    grads = [p.grad for g in attached.parameter_groups() for p in g.parameters]
    return n_tokens, loss, [grad.clone() for grad in grads if grad is not None]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "method"), [("llama", "lora"), ("gpt2", "lora"), ("llama", "prefix")]
)
def test_losses_and_gradients_are_those_of_padded_rows(
    kind: str, method: str, precision: Precision, causal_data: TaskData
) -> None:
    backbone = _backbone(kind)
    some = plan_of(backbone.topology, method, 3)
    assert some is not None
    # Above the first block, which the cache then skips.
    specs = [replace(some.specs[0], layer=layer) for layer in (1, 2)]
    with attach(backbone, candidate_of(AdapterPlan(specs)), seed=0) as attached:
        disturb(attached)
        setup = _setup(backbone, causal_data, attached, precision)
        padded, loss, expected = _first_step(attached, setup)
        packing = Packing(setup.task, causal_data, precision=precision)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = _first_step(attached, replace(setup, packing=packing))
    assert not packing.is_off
    packed, own_loss, own = found
    assert packed < padded
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    assert own_loss == pytest.approx(loss, rel=tolerance)
    assert len(own) == len(expected) > 0
    scale = max(float(grad.abs().max()) for grad in expected)
    for pair in zip(own, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=10 * tolerance, atol=tolerance * scale)


def test_rows_behind_a_prompt_are_padded(causal_data: TaskData) -> None:
    backbone = _backbone("llama")
    plan = plan_of(backbone.topology, "prompt_tuning", 0)
    assert plan is not None
    packing = Packing(SupervisedFineTuning(), causal_data)
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        batch = packing.batch(attached.model, np.arange(12, dtype=np.int64))
    assert batch.cells is None


def test_a_model_that_mixes_packed_rows_is_trained_on_padded_ones(causal_data: TaskData) -> None:
    model = tiny_llama()
    forward = model.forward
    model.forward = lambda position_ids=None, **inputs: forward(**inputs)
    packing = Packing(SupervisedFineTuning(), causal_data)
    rows = np.arange(12, dtype=np.int64)
    with pytest.warns(UserWarning, match="sequence packing for LlamaForCausalLM is off"):
        assert packing.batch(model, rows).cells is None
    assert packing.is_off
    assert packing.batch(model, rows).cells is None
