from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from autopeft.tasks.batch import collate
from autopeft.tasks.data import TaskData
from autopeft.tasks.text_classification import TextClassification
from autopeft.training.latency import measure_latency_ms, measure_peak_memory_bytes

Build = Callable[..., Any]


@pytest.mark.benchmark
def test_latency_grows_with_depth(classification_data: TaskData, bert_with_lora: Build) -> None:
    shallow, deep = (
        measure_latency_ms(bert_with_lora(depth=depth).model, classification_data, device="cpu")
        for depth in (1, 8)
    )
    assert 0 < shallow < deep


def peak(data: TaskData, attached: Any, rows: int) -> int:
    batch = collate(data, "train", data.train.source_rows[:rows])
    task = TextClassification(data.labels, data.pad_id)
    return measure_peak_memory_bytes(
        attached.model, lambda: task.loss(attached.model, batch), device="cpu"
    )


def test_memory_is_weights_plus_what_the_backward_pass_needs(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    attached = bert_with_lora()
    weights = sum(p.numel() * 4 for p in attached.model.parameters())
    trained = sum(p.numel() * 4 for p in attached.model.parameters() if p.requires_grad)
    few, many = (peak(classification_data, attached, rows) for rows in (4, 64))
    assert few > weights + 3 * trained
    assert many > few
    # Adapters in the top block only: nothing is saved below it.
    assert peak(classification_data, bert_with_lora([2]), 64) < many
    assert all(p.grad is None for p in attached.model.parameters())


def test_latency_takes_several_rows(classification_data: TaskData, bert_with_lora: Build) -> None:
    value = measure_latency_ms(
        bert_with_lora().model, classification_data, device="cpu", rows=8, repeats=3
    )
    assert 0 < value < math.inf
