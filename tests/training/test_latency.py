from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from autopeft.tasks.data import TaskData
from autopeft.training.latency import measure_latency_ms

Build = Callable[..., Any]


@pytest.mark.benchmark
def test_latency_grows_with_depth(classification_data: TaskData, bert_with_lora: Build) -> None:
    shallow, deep = (
        measure_latency_ms(bert_with_lora(depth=depth).model, classification_data, device="cpu")
        for depth in (1, 8)
    )
    assert 0 < shallow < deep


def test_latency_takes_several_rows(classification_data: TaskData, bert_with_lora: Build) -> None:
    model = bert_with_lora().model
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _m, _a, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    value = measure_latency_ms(model, classification_data, device="cpu", rows=8, repeats=3)
    assert len(shapes) == 6  # Three to warm up.
    assert len(set(shapes)) == 1
    assert shapes[0][0] == 8
    assert 0 < value < math.inf
