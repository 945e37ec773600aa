from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autopeft.tasks.batch import collate
from autopeft.tasks.data import TaskData
from autopeft.tasks.text_classification import TextClassification
from autopeft.training import attention
from autopeft.training.precision import autocast


def gradients(model: Any, data: TaskData, *, is_faster: bool, monkeypatch: Any) -> Any:
    monkeypatch.setattr(attention, "fp32_attention_is_faster", lambda _device: is_faster)
    batch = collate(data, "train", data.train.source_rows[:8])
    model.zero_grad()
    with attention.training_attention("bf16", "cpu"), autocast("bf16", "cpu"):
        loss = TextClassification(data.labels, data.pad_id).loss(model, batch)
        loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def test_it_changes_rounding_only_and_is_undone(
    classification_data: TaskData,
    bert_with_lora: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = bert_with_lora().model.eval()
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    native = gradients(model, classification_data, is_faster=False, monkeypatch=monkeypatch)
    in_fp32 = gradients(model, classification_data, is_faster=True, monkeypatch=monkeypatch)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is usual
    for one, other in zip(native, in_fp32, strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=2e-3)
    assert any(not torch.equal(a, b) for a, b in zip(native, in_fp32, strict=True))


def test_the_measurement_is_kept() -> None:
    first = attention.fp32_attention_is_faster("cpu")
    assert attention.fp32_attention_is_faster("cpu") is first


def test_fp32_training_is_left_alone() -> None:
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with attention.training_attention("fp32", "cpu"):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is usual
