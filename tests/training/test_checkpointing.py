from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from autopeft.plan import TrainSettings
from autopeft.tasks.data import TaskData
from autopeft.tasks.text_classification import TextClassification
from autopeft.training.checkpointing import recomputed
from autopeft.training.precision import Precision
from autopeft.training.setup import TrainingSetup
from autopeft.training.trainer import Trainer

Build = Callable[..., Any]
_BLOCKS = ("bert.encoder.layer.0", "bert.encoder.layer.1")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_is_the_same_with_blocks_computed_again(
    precision: Precision, classification_data: TaskData, bert_with_lora: Build
) -> None:
    found, task = [], TextClassification(classification_data.labels, classification_data.pad_id)
    for blocks in ((), _BLOCKS):
        attached = bert_with_lora(dropout=0.3)
        setup = TrainingSetup(task, classification_data, precision=precision, recomputed=blocks)
        train = TrainSettings(1e-2, steps=4, batch_size=8)
        training = Trainer(attached, setup, train, seed=0)
        training.train_to(4)
        found.append([p.detach() for g in attached.parameter_groups() for p in g.parameters])
        assert not any("forward" in vars(module) for module in attached.model.modules())
    assert len(found[0]) > 0
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_forward_of_the_instance_comes_back(llama_with_lora: Build) -> None:
    model = llama_with_lora().model
    block = model.get_submodule("model.layers.0")
    own = block.forward = block.forward
    with recomputed(model, ("model.layers.0",)):
        assert block.forward is not own
    assert block.forward is own
