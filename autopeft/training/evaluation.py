"""Scores a split, in large batches and without a gradient."""

from __future__ import annotations

import numpy as np
import torch

from autopeft.tasks.base import BatchScores, Evaluation, SplitScores, Task
from autopeft.tasks.batch import collate
from autopeft.tasks.data import SplitName, TaskData
from autopeft.training.batching import evaluation_batches
from autopeft.training.precision import Precision, autocast
from autopeft.training.prefix import NO_PREFIX, Prefix

TOKEN_BUDGET = {"cpu": 4096, "cuda": 65536}
"""Padded tokens of an evaluation batch: enough to keep the device busy, small beside the model."""


def evaluate(
    model: torch.nn.Module,
    task: Task,
    data: TaskData,
    split: SplitName,
    *,
    device: str,
    precision: Precision = "fp32",
    prefix: Prefix = NO_PREFIX,
) -> Evaluation:
    """Scores every row of a split.

    Puts the model into evaluation mode and leaves it there.

    Args:
        model: Model with its adapters.
        task: Scores batches and sums up.
        data: Where the split is.
        split: Which one.
        device: Where the model is.
        precision: What to compute in.
        prefix: Stands in for the frozen lower blocks, if it can.
    """
    model.eval()
    lengths = data.splits[split].lengths
    budget = TOKEN_BUDGET.get(torch.device(device).type, TOKEN_BUDGET["cpu"])
    order: list[np.ndarray] = []
    scored: list[BatchScores] = []
    with torch.inference_mode():
        for rows in evaluation_batches(lengths, budget):
            batch = collate(data, split, rows, device)
            with autocast(precision, device), prefix.serving(batch):
                scored.append(task.score(model, batch))
            order.append(rows)
    return task.summarise(_in_split_order(np.concatenate(order), scored, data, split))


def _in_split_order(
    order: np.ndarray, scored: list[BatchScores], data: TaskData, split: SplitName
) -> SplitScores:
    """Puts the scores back from evaluation order into the split's."""

    def back(parts: list[torch.Tensor], kind: type[np.generic]) -> np.ndarray:
        out = np.empty(len(order), dtype=kind)
        out[order] = torch.cat(parts).cpu().numpy()
        return out

    return SplitScores(
        losses=back([s.losses for s in scored], np.float64),
        weights=back([s.weights for s in scored], np.float64),
        correct=back([s.correct for s in scored], np.float64),
        predictions=back([s.predictions for s in scored], np.int64),
        targets=data.splits[split].targets,
    )
