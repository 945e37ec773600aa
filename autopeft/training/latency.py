"""Measures the latency of a model with its adapters attached."""

from __future__ import annotations

import statistics

import numpy as np
import torch

from autopeft.models.attention import attention_in
from autopeft.tasks.batch import collate
from autopeft.tasks.data import TaskData
from autopeft.training.measuring import Trained
from autopeft.training.precision import Precision, autocast, seconds_of


def latency_ms(trained: Trained) -> float:
    """Return the latency of a trained candidate, as `measure_latency_ms` measures it."""
    return measure_latency_ms(
        trained.model, trained.data, device=trained.device, precision=trained.precision
    )


def measure_latency_ms(
    model: torch.nn.Module,
    data: TaskData,
    *,
    device: str,
    precision: Precision = "fp32",
    rows: int = 1,
    repeats: int = 15,
) -> float:
    """Return the median milliseconds of one forward pass, with adapters attached, not merged.

    The pass has `rows` validation rows of median length; of rows of several sequences, such as a
    preference's two answers, the first one. Three passes of warm-up are not counted.
    """
    lengths = data.validation.lengths
    order = np.argsort(lengths, kind="stable")
    start = max(0, (len(order) - rows) // 2)
    batch = collate(data, "validation", order[start : start + rows], device)
    was_training = model.training
    model.eval()
    inputs = dict(batch.model_inputs())
    if (per_row := data.validation.sequences_per_row) > 1:
        first = {name: tensor[::per_row] for name, tensor in inputs.items()}
        is_used = first["attention_mask"].any(dim=0)
        inputs = {name: tensor[:, is_used] for name, tensor in first.items()}
    with torch.inference_mode(), autocast(precision, device), attention_in(precision, model):
        seconds = [seconds_of(lambda: model(**inputs), device) for _ in range(repeats + 3)]
    model.train(was_training)
    return 1000 * statistics.median(seconds[3:])
