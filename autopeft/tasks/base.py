"""What a task is: how a batch is scored, and what the scores of a split amount to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from autopeft.costs.objectives import Objective
from autopeft.errors import SettingsError
from autopeft.tasks.batch import Batch, Window

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Scores of one split.

    Attributes:
        loss: Mean loss: per row, or per completion token for causal LM.
        metrics: Every metric of the task by name.
        rows: Quality of each row, in the order of the split, shape (n_rows,), larger is better:
            what a paired bootstrap resamples.
    """

    loss: float
    metrics: Mapping[str, float]
    rows: FloatArray


@dataclass(frozen=True)
class BatchScores:
    """Scores of one batch, still on the device: reading them back waits for the accelerator.

    Attributes:
        losses: Summed loss of each row, shape (b,), float32.
        weights: What each row's loss is a sum over (1, or its completion tokens), shape (b,).
        correct: Of those, how many are predicted right, shape (b,).
        predictions: Index of the predicted label, shape (b,); the row's count of right tokens
            again for causal LM.
    """

    losses: torch.Tensor
    weights: torch.Tensor
    correct: torch.Tensor
    predictions: torch.Tensor


@dataclass(frozen=True)
class SplitScores:
    """`BatchScores` of a whole split, in its order; each of shape (n_rows,)."""

    losses: FloatArray
    weights: FloatArray
    correct: FloatArray
    predictions: NDArray[np.int64]
    targets: NDArray[np.int64]


class Task(Protocol):
    """One kind of learning problem.

    Attributes:
        name: As in `SearchSettings.task`.
        auto_class: Name of the class of transformers that loads a model for it.
        quality: The objective the search maximizes (or minimizes).
        metrics: Every metric an evaluation reports.
    """

    name: str
    auto_class: str
    quality: Objective
    metrics: tuple[Objective, ...]

    def model_kwargs(self) -> dict[str, Any]:
        """What `from_pretrained` must be told, e.g. the labels."""
        ...

    def windows(self, batch: Batch) -> Mapping[str, Window]:
        """Where a model's last hidden states may be read for this task: name -> positions.

        Which one it is depends on the model (`autopeft.profiling.output_positions`), if any.
        """
        ...

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Mean loss of a batch, a float32 scalar to differentiate."""
        ...

    def losses(self, model: torch.nn.Module, batch: Batch, n_parts: int) -> torch.Tensor:
        """Mean loss of each of so many equal parts of a batch, shape (n_parts,)."""
        ...

    def score(self, model: torch.nn.Module, batch: Batch) -> BatchScores:
        """Scores of a batch; call it under `torch.inference_mode()`."""
        ...

    def summarize(self, scores: SplitScores) -> Evaluation:
        """Loss, metrics and row qualities from the scores of a split."""
        ...


def choose_quality(task: str, wanted: str | None, metrics: Sequence[Objective]) -> Objective:
    """The quality objective: the metric asked for, else the task's first.

    Raises:
        SettingsError: if the task does not measure it.
    """
    if wanted is None:
        return metrics[0]
    for metric in metrics:
        if metric.name == wanted:
            return metric
    known = ", ".join(metric.name for metric in metrics)
    raise SettingsError("metric", wanted, f"not measured by {task}", f"use one of {known}")
