"""Measures the latency of a model."""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from autopeft.tasks.batch import collate
from autopeft.tasks.data import TaskData
from autopeft.training.precision import Precision, autocast, synchronize


def measure_latency_ms(
    model: torch.nn.Module,
    data: TaskData,
    *,
    device: str,
    rows: int = 1,
    precision: Precision = "fp32",
    repeats: int = 15,
) -> float:
    """Return the median milliseconds of one forward pass, with adapters attached, not merged.

    Args:
        model: Model with its adapters.
        data: Validation rows of median length are taken from it.
        device: Device of the model.
        rows: Rows per pass.
        precision: Precision of the computation.
        repeats: Passes to time, after three passes of warm-up.
    """
    lengths = data.validation.lengths
    order = np.argsort(lengths, kind="stable")
    start = max(0, (len(order) - rows) // 2)
    batch = collate(data, "validation", order[start : start + rows], device)
    was_training = model.training
    model.eval()
    milliseconds = []
    with torch.inference_mode(), autocast(precision, device):
        for number in range(repeats + 3):
            synchronize(device)
            started = time.perf_counter()
            model(**batch.model_inputs())
            synchronize(device)
            if number >= 3:
                milliseconds.append(1000 * (time.perf_counter() - started))
    model.train(was_training)
    return statistics.median(milliseconds)
