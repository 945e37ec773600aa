"""Measures the latency of a model."""

from __future__ import annotations

import statistics

import numpy as np
import torch

from autopeft.tasks.batch import collate
from autopeft.tasks.data import TaskData
from autopeft.training.precision import seconds_of


def measure_latency_ms(
    model: torch.nn.Module, data: TaskData, *, device: str, rows: int = 1, repeats: int = 15
) -> float:
    """Return the median milliseconds of one forward pass, with adapters attached, not merged.

    The pass has `rows` validation rows of median length. Three passes of warm-up are not counted.
    """
    lengths = data.validation.lengths
    order = np.argsort(lengths, kind="stable")
    start = max(0, (len(order) - rows) // 2)
    batch = collate(data, "validation", order[start : start + rows], device)
    was_training = model.training
    model.eval()
    inputs = batch.model_inputs()
    with torch.inference_mode():
        seconds = [seconds_of(lambda: model(**inputs), device) for _ in range(repeats + 3)]
    model.train(was_training)
    return 1000 * statistics.median(seconds[3:])
