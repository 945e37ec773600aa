"""The Task protocol, and the scores that a task computes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from autopeft.costs.objectives import Objective
from autopeft.errors import SettingsError
from autopeft.settings import SearchSettings
from autopeft.tasks.batch import Batch, Window
from autopeft.tasks.data import EncodedSplit, SplitName, TaskData
from autopeft.tasks.rows import Rows

if TYPE_CHECKING:
    from autopeft.tasks.reading import Table

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Scores of one split.

    Attributes:
        loss: Mean loss: per row, or per completion token for causal LM.
        metrics: Every metric of the task by name.
        rows: Quality of each row in the order of the split, shape (n_rows,), larger is better.
            A paired bootstrap resamples these.
    """

    loss: float
    metrics: Mapping[str, float]
    rows: FloatArray


@dataclass(frozen=True)
class BatchScores:
    """Scores of one batch, kept on the device: copying them would wait for the accelerator.

    Attributes:
        losses: Summed loss of each row, shape (b,), float32.
        weights: Number of terms in each row's loss (1, or its completion tokens), shape (b,).
        correct: Number of terms predicted correctly, shape (b,).
        predictions: Index of the predicted label, shape (b,); for causal LM, `correct` again.
    """

    losses: torch.Tensor
    weights: torch.Tensor
    correct: torch.Tensor
    predictions: torch.Tensor


@dataclass(frozen=True)
class SplitScores:
    """`BatchScores` of a whole split in its order, each of shape (n_rows,)."""

    losses: FloatArray
    weights: FloatArray
    correct: FloatArray
    predictions: NDArray[np.int64]
    targets: NDArray[np.int64]


class Task(Protocol):
    """One kind of problem: its columns, encoding, loss, prediction and metrics.

    Attributes:
        name: Its name in the settings.
        auto_class: Name of the class of transformers that loads a model for it.
        quality: The objective that a search optimizes.
        metrics: Every metric that an evaluation reports.
    """

    name: str
    auto_class: str
    quality: Objective
    metrics: tuple[Objective, ...]

    @staticmethod
    def target_column(settings: SearchSettings) -> tuple[str, str]:
        """Return the setting and the column of what is to be learned."""
        ...

    @staticmethod
    def clean(settings: SearchSettings, table: Table) -> Rows:
        """Return the complete rows of a table as text."""
        ...

    @staticmethod
    def strata(rows: Rows) -> Sequence[Hashable]:
        """Return what splits balance, one value per row."""
        ...

    @staticmethod
    def check_rows(settings: SearchSettings, rows: Rows) -> None:
        """Raise a DataError if the rows of the training source cannot be learned from."""
        ...

    @staticmethod
    def labels_of(splits: Mapping[SplitName, Rows]) -> tuple[str, ...]:
        """Return the label names in the order of their index; empty if there are none."""
        ...

    @staticmethod
    def encode(
        tokenizer: Any, rows: Rows, labels: tuple[str, ...], max_length: int
    ) -> EncodedSplit:
        """Tokenize rows, each at most `max_length` tokens long."""
        ...

    @classmethod
    def from_data(cls, data: TaskData, metric: str | None) -> Task:
        """Return the task for encoded data; None: the task's default metric.

        Raises:
            SettingsError: if the task does not measure the metric.
        """
        ...

    def model_kwargs(self) -> dict[str, Any]:
        """Return arguments for `from_pretrained`, e.g. the labels."""
        ...

    def windows(self, batch: Batch) -> Mapping[str, Window]:
        """Return the positions where a model may read its last hidden states, by name.

        Which one it reads, if any, depends on the model (`autopeft.profiling.output_positions`).
        """
        ...

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean loss of a batch, a differentiable float32 scalar."""
        ...

    def losses(self, model: torch.nn.Module, batch: Batch, n_parts: int) -> torch.Tensor:
        """Return the mean loss of each of `n_parts` equal parts of a batch, shape (n_parts,)."""
        ...

    def score(self, model: torch.nn.Module, batch: Batch) -> BatchScores:
        """Return the scores of a batch; called under `torch.inference_mode()`."""
        ...

    def summarize(self, scores: SplitScores) -> Evaluation:
        """Return loss, metrics and row qualities of a split."""
        ...


def choose_quality(task: str, wanted: str | None, metrics: Sequence[Objective]) -> Objective:
    """Return the metric asked for as the quality objective, else the task's first.

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
