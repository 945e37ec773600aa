from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from autopeft.errors import SettingsError
from autopeft.plan import TrainSettings
from autopeft.settings import SearchSettings
from autopeft.tasks.data import TaskData
from autopeft.tasks.text_classification import TextClassification
from autopeft.training.optimizers import check_optimizer, make_optimizer
from autopeft.training.setup import TrainingSetup
from autopeft.training.trainer import Trainer

_HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


@pytest.mark.skipif(not _HAS_BITSANDBYTES, reason="needs bitsandbytes")
def test_moments_in_8_bits_learn_as_adamw_does(
    classification_data: TaskData, bert_with_lora: Callable[..., Any]
) -> None:
    check_optimizer("adamw_8bit", "cpu")
    task = TextClassification(classification_data.labels, classification_data.pad_id)
    losses = []
    for name in ("adamw", "adamw_8bit"):
        setup = TrainingSetup(task, classification_data, optimizer=name)
        training = Trainer(
            bert_with_lora(), setup, TrainSettings(1e-2, steps=30, batch_size=16), seed=0
        )
        losses.append(training.advance(30).loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.3)
    assert max(losses) < 0.68


@pytest.mark.skipif(not _HAS_BITSANDBYTES, reason="needs bitsandbytes")
def test_large_tensors_have_moments_of_one_byte() -> None:
    class Group:
        method, learning_rate = "lora", 1e-3
        parameters = (torch.nn.Parameter(torch.ones(64, 64)), torch.nn.Parameter(torch.ones(9)))

    optimizer = make_optimizer("adamw_8bit", [Group()], 0.0)  # type: ignore[list-item]
    for parameter in Group.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    large, small = (optimizer.state[parameter] for parameter in Group.parameters)
    assert large["state1"].dtype == large["state2"].dtype == torch.uint8
    assert small["state1"].dtype == torch.float32
    assert optimizer.param_groups[0]["peak"] == 1e-3


@pytest.mark.skipif(not _HAS_BITSANDBYTES, reason="needs bitsandbytes")
def test_a_cpu_has_nothing_to_page_from() -> None:
    with pytest.raises(SettingsError, match="cpu has no memory of its own to page from"):
        check_optimizer("paged_adamw_8bit", "cpu")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SettingsError, match="bitsandbytes is not installed; run: pip install"):
        check_optimizer("adamw_8bit", "cpu")
    check_optimizer("adamw", "cpu")


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(SettingsError, match="use one of adamw, adamw_8bit"):
        SearchSettings.from_mapping({"optimizer": "adam"})
