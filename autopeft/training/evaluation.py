"""Scores a split in large batches, without gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autopeft.tasks.base import Evaluation
from autopeft.tasks.batch import collate
from autopeft.tasks.data import SplitName
from autopeft.training.batching import IntArray, evaluation_batches, rung_sample
from autopeft.training.precision import autocast, rounded_once
from autopeft.training.setup import TrainingSetup

TOKEN_BUDGET = {"cpu": 1024, "cuda": 65536}
"""Padded tokens of an evaluation batch: enough to keep the device busy, but small in memory. On a
CPU, short texts are scored a fifth faster than with 4,096: there is less padding, and activations
stay in its caches."""


def token_budget(device: str) -> int:
    """Return the padded tokens of an evaluation batch on a device."""
    return TOKEN_BUDGET.get(torch.device(device).type, TOKEN_BUDGET["cpu"])


def evaluate(
    model: torch.nn.Module,
    setup: TrainingSetup,
    split: SplitName,
    *,
    rows: IntArray | None = None,
    with_text: bool = True,
    n_draws: int = 0,
) -> Evaluation:
    """Score the rows of a split. The model is in evaluation mode afterwards.

    Args:
        model: Model with its adapters.
        setup: Task, data and precision.
        split: Name of the split.
        rows: Positions in the split, each once, and the order of the result's `rows`; None: all.
        with_text: Whether text is generated, if a metric of the task needs it.
        n_draws: Resamples of the rows, for a quality that is no mean over them.
    """
    model.eval()
    device, source = setup.device, setup.data.splits[split]
    wanted = np.arange(len(source), dtype=np.int64) if rows is None else rows
    order: list[IntArray] = []
    scored: list[Mapping[str, torch.Tensor]] = []
    with torch.inference_mode(), rounded_once(model, setup.precision, device):
        for places in evaluation_batches(source.lengths[wanted], token_budget(device)):
            batch = collate(setup.data, split, wanted[places], device)
            with setup.forward(batch):
                scored.append(setup.task.score(model, batch))
            order.append(places)
        generated = None
        if with_text and setup.task.needs_text():
            sample = rung_sample(len(wanted), setup.task.settings.generation_rows)
            chosen = wanted if sample is None else wanted[sample]
            with autocast(setup.precision, device):
                generated = setup.task.generate(model, setup.data, split, chosen, device)
    scores = _joined(np.concatenate(order), scored)
    return setup.task.summarize(scores, source, wanted, generated=generated, n_draws=n_draws)


def _joined(
    order: IntArray, scored: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, NDArray[Any]]:
    """Concatenate the scores and restore the order of the rows."""
    joined = {}
    for name in scored[0]:
        values = torch.cat([scores[name] for scores in scored]).cpu().numpy()
        if np.issubdtype(values.dtype, np.floating):
            values = values.astype(np.float64)
        joined[name] = np.empty_like(values)
        joined[name][order] = values
    return joined
