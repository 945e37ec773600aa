"""A step whose gradient is accumulated from micro-batches is the step at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from training_samples import VOCABULARY, Attached, with_lora
from transformers import T5Config, T5ForConditionalGeneration

from autopeft.plan import TrainSettings
from autopeft.tasks.base import Task
from autopeft.tasks.data import Ragged, TaskData
from autopeft.tasks.seq2seq import Seq2Seq
from autopeft.tasks.sft import SupervisedFineTuning
from autopeft.tasks.text_classification import TextClassification
from autopeft.training.setup import TrainingSetup
from autopeft.training.trainer import Trainer, train_adapters_only

Build = Callable[..., Any]


def _gradients(
    attached: Any, task: Task, data: TaskData, budget: int | None
) -> tuple[int, float, list[torch.Tensor]]:
    """Return the passes of the first step, its loss and its gradients."""
    setup = TrainingSetup(task, data, micro_batch_tokens=budget)
    training = Trainer(attached, setup, TrainSettings(1e-2, steps=1, batch_size=12), seed=0)
    parts = training._micro_batches(training.next_rows())
    train_adapters_only(attached.model)
    attached.model.zero_grad()
    loss = float(training._backward(parts))
    grads = [p.grad for g in attached.parameter_groups() for p in g.parameters]
    return len(parts), loss, [grad for grad in grads if grad is not None]


def _t5(data: TaskData) -> tuple[Any, TaskData]:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    attached = Attached(with_lora(T5ForConditionalGeneration(config), ["q", "v"]))
    train = data.splits["train"]
    # Answers of one to four tokens.
    ends = np.cumsum([0, *(1 + np.arange(len(train)) % 4)])
    words = np.random.default_rng(0).integers(7, VOCABULARY, ends[-1]).astype(np.int32)
    labels = Ragged(words, ends.astype(np.int64))
    before = Ragged(np.roll(words, 1), labels.offsets)
    ragged = {"labels": labels, "decoder_input_ids": before}
    splits = {**data.splits, "train": replace(train, row_arrays={}, ragged=ragged)}
    return attached, replace(data, splits=splits, labels=(), input_names=Seq2Seq.input_names)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_gradients_and_loss_are_those_of_the_step_at_once(
    kind: str,
    classification_data: TaskData,
    causal_data: TaskData,
    bert_with_lora: Build,
    llama_with_lora: Build,
) -> None:
    data = classification_data
    task: Task = TextClassification(("bad", "good"), 0)
    if kind == "bert":
        attached = bert_with_lora()
    elif kind == "llama":
        attached, data, task = llama_with_lora(), causal_data, SupervisedFineTuning()
    else:
        attached, data = _t5(data)
        task = Seq2Seq().bound(data)
    passes, loss, expected = _gradients(attached, task, data, None)
    assert passes == 1
    passes, accumulated, found = _gradients(attached, task, data, 40)
    assert passes > 2
    assert accumulated == pytest.approx(loss, rel=1e-5)
    assert len(found) == len(expected) > 0
    scale = max(float(grad.abs().max()) for grad in expected)
    for pair in zip(found, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5 * scale)
