"""Scores a split in large batches, without gradients."""

from __future__ import annotations

import numpy as np
import torch

from autopeft.tasks.base import BatchScores, Evaluation, SplitScores
from autopeft.tasks.batch import collate
from autopeft.tasks.data import SplitName
from autopeft.training.batching import IntArray, evaluation_batches
from autopeft.training.precision import rounded_once
from autopeft.training.setup import TrainingSetup

TOKEN_BUDGET = {"cpu": 4096, "cuda": 65536}
"""Padded tokens of an evaluation batch: enough to keep the device busy, but small in memory."""


def evaluate(
    model: torch.nn.Module, setup: TrainingSetup, split: SplitName, *, rows: IntArray | None = None
) -> Evaluation:
    """Score the rows of a split. The model is in evaluation mode afterwards.

    `rows` are positions in the split, each once, and the order of the result's rows; None: all.
    """
    model.eval()
    device, source = setup.device, setup.data.splits[split]
    wanted = np.arange(len(source), dtype=np.int64) if rows is None else rows
    budget = TOKEN_BUDGET.get(torch.device(device).type, TOKEN_BUDGET["cpu"])
    order: list[IntArray] = []
    scored: list[BatchScores] = []
    with torch.inference_mode(), rounded_once(model, setup.precision, device):
        for places in evaluation_batches(source.lengths[wanted], budget):
            batch = collate(setup.data, split, wanted[places], device)
            with setup.forward(batch):
                scored.append(setup.task.score(model, batch))
            order.append(places)
    return setup.task.summarize(_joined(np.concatenate(order), scored, source.targets[wanted]))


def _joined(order: IntArray, scored: list[BatchScores], targets: IntArray) -> SplitScores:
    """Concatenate the scores and restore the order of the rows."""

    def back(parts: list[torch.Tensor], kind: type[np.generic]) -> np.ndarray:
        out = np.empty(len(order), dtype=kind)
        out[order] = torch.cat(parts).cpu().numpy()
        return out

    return SplitScores(
        losses=back([s.losses for s in scored], np.float64),
        weights=back([s.weights for s in scored], np.float64),
        correct=back([s.correct for s in scored], np.float64),
        predictions=back([s.predictions for s in scored], np.int64),
        targets=targets,
    )
