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
    value = measure_latency_ms(
        bert_with_lora().model, classification_data, device="cpu", rows=8, repeats=3
    )
    assert 0 < value < math.inf
