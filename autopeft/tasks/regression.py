"""Regression: predicts a number for each text, or for each pair of texts."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from autopeft.costs.objectives import Objective
from autopeft.errors import DataError
from autopeft.models.output_scale import has_output_bias
from autopeft.tasks.base import Evaluation, Scores, Task
from autopeft.tasks.batch import Batch
from autopeft.tasks.columns import Column
from autopeft.tasks.data import EncodedSplit, OutputScale, SplitName, TaskData
from autopeft.tasks.encoding import encode_texts
from autopeft.tasks.examples import Examples, is_missing
from autopeft.tasks.labels import has_head
from autopeft.tasks.reading import Table
from autopeft.tasks.text_classification import LABEL_NAMES, TextClassification, row_logits

FloatArray = NDArray[np.float64]

_NUMBER_NAMES = ("score", "similarity_score", "similarity", "rating", "value", "number")
_STRATA = 5
"""Splits balance the fifths of the numbers."""


class Regression(TextClassification):
    """Predicts one number per text, by a head with one output.

    A new head is trained on standardized numbers: less the mean, over the deviation of the training
    rows. Adam moves a head's bias by about the learning rate each step, and would never reach a
    mean of 1000. `loss` is the mean squared error of the standardized numbers, all other metrics
    are in the data's own unit, and so is the output of a saved head: the last layer is multiplied
    by the deviation and the mean is added to its bias when it is saved. A head without a bias (that
    of most decoders) cannot add a mean, so the numbers are only divided, by their root mean square.
    A head that the checkpoint has already is not trained and keeps its unit.

    Args:
        labels: Not used.
        pad_id: Id of the padding token.
        metric: Quality to optimize: pearson (default), spearman, mse, mae, r2 or loss.
    """

    name = "regression"
    description = "a number for each text, or for each pair of texts"
    columns = (
        *TextClassification.columns[:2],
        Column("label", "number", "the number", names=(*_NUMBER_NAMES, *LABEL_NAMES)),
    )
    metrics = (
        *(Objective(name, "maximize") for name in ("pearson", "spearman")),
        *(Objective(name, "minimize") for name in ("mse", "mae")),
        Objective("r2", "maximize"),
        Objective("loss", "minimize"),
    )
    scale: OutputScale = OutputScale()

    @classmethod
    def check_fit(cls, table: Table, names: Mapping[str, str]) -> None:
        """Check the kinds of the first rows' cells."""
        super(TextClassification, cls).check_fit(table, names)

    def clean(self, table: Table) -> Examples:
        """Return the complete rows of a source, and count the others by what they lack."""
        return Task.clean(self, table)

    def clean_column(self, column: Column, values: Sequence[Any]) -> Sequence[Any]:
        """Return numbers as floats.

        Raises:
            DataError: if one is infinite.
        """
        if column.role != "label":
            return values
        numbers = [None if is_missing(value) else float(value) for value in values]
        numbers = [None if n is None or math.isnan(n) else n for n in numbers]
        for row, number in enumerate(numbers):
            if number is not None and math.isinf(number):
                name = self.settings.column_names().get("label", "label")
                raise DataError(
                    "label", name, f"row {row} is {values[row]!r}", "give finite numbers"
                )
        return numbers

    def strata(self, rows: Examples) -> Sequence[Hashable]:
        """Return which fifth of the numbers each row's is in."""
        values = np.asarray(rows["label"], dtype=np.float64)
        if not len(values):
            return []
        edges = np.quantile(values, np.linspace(0, 1, _STRATA + 1)[1:-1])
        return [int(i) for i in np.searchsorted(edges, values, side="right")]

    def check_rows(self, rows: Examples) -> None:
        """Raise a DataError if all numbers of the training source are the same."""
        if len(set(rows["label"])) == 1:
            raise DataError(
                "label",
                self.settings.column_names().get("label", "label"),
                f"all rows have the number {rows['label'][0]:g}",
                "give rows with different numbers",
            )

    def labels_of(self, splits: Mapping[SplitName, Examples]) -> tuple[str, ...]:
        """Return nothing: numbers have no names."""
        return ()

    def output_scale(self, splits: Mapping[SplitName, Examples]) -> OutputScale:
        """Return mean and deviation of the training rows, as far as the head can express them."""
        config = self.model_config
        if has_head(config, "SequenceClassification") and getattr(config, "num_labels", 0) == 1:
            return OutputScale()
        values = np.asarray(splits["train"]["label"], dtype=np.float64)
        if config is not None and has_output_bias(config, self.auto_class):
            return OutputScale(float(values.mean()), float(values.std()) or 1.0)
        return OutputScale(0.0, float(np.sqrt(np.mean(values**2))) or 1.0)

    def notes(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """Say so if the checkpoint's head is replaced."""
        n_outputs = getattr(self.model_config, "num_labels", 1)
        if n_outputs == 1 or not has_head(self.model_config, "SequenceClassification"):
            return ()
        return (f"the model's head has {n_outputs} outputs, not one; a new head is trained",)

    def encode(
        self, processor: Any, rows: Examples, labels: tuple[str, ...], max_length: int
    ) -> EncodedSplit:
        """Tokenize texts or pairs; "labels" is each row's number, float32, in its own unit."""
        return encode_texts(processor, rows, np.asarray(rows["label"], np.float32), max_length)

    def bound(self, data: TaskData) -> Self:
        """Return the task for encoded data, ready to compute losses and scores."""
        twin = super().bound(data)
        twin.scale = data.output_scale or OutputScale()
        return twin

    def model_kwargs(self) -> dict[str, Any]:
        """Return one output, its kind, and the padding token."""
        return {"num_labels": 1, "problem_type": "regression", "pad_token_id": self.pad_id}

    def row_losses(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the squared error of each row's standardized number, and ones."""
        losses = self._squared_errors(row_logits(model, batch).squeeze(-1), batch)
        return losses, torch.ones_like(losses)

    def score(self, model: torch.nn.Module, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Return the loss and the predicted number, in its own unit, of each row."""
        outputs = row_logits(model, batch).squeeze(-1)
        losses = self._squared_errors(outputs, batch)
        return {
            "loss": losses,
            "weight": torch.ones_like(losses),
            "prediction": outputs.double() * self.scale.factor + self.scale.shift,
        }

    def _squared_errors(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        targets = (batch.labels.float() - self.scale.shift) / self.scale.factor
        return (outputs - targets) ** 2

    def summarize(self, scores: Scores, split: EncodedSplit, rows: NDArray[np.int64]) -> Evaluation:
        """Return correlations, errors in the unit of the numbers, R squared and loss.

        The mean of the row qualities is the quality: of a correlation, products of standardized
        values; of R squared, one less the squared error over the variance of the targets.
        """
        targets = split.row_arrays["labels"][rows].astype(np.float64)
        predictions = scores["prediction"]
        qualities = row_qualities(targets, predictions)
        loss = float(scores["loss"].mean())
        metrics = {name: float(values.mean()) for name, values in qualities.items()}
        own = qualities.get(self.quality.name, scores["loss"])
        return Evaluation(loss, {**metrics, "loss": loss}, own * self.quality.sign())


def row_qualities(targets: FloatArray, predictions: FloatArray) -> dict[str, FloatArray]:
    """Return for each metric one value per row, whose mean is the metric.

    Correlation with a constant is 0, and R squared of constant targets is NaN.
    """
    squares = (targets - predictions) ** 2
    spread = targets.var()
    explained = 1.0 - squares / spread if spread > 0 else np.full_like(squares, np.nan)
    return {
        "pearson": _products(targets, predictions),
        "spearman": _products(_ranks(targets), _ranks(predictions)),
        "mse": squares,
        "mae": np.abs(targets - predictions),
        "r2": explained,
    }


def _products(x: FloatArray, y: FloatArray) -> FloatArray:
    """Return products of standardized values: their mean is Pearson's correlation."""
    if np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        return np.zeros_like(x)
    found: FloatArray = (x - x.mean()) * (y - y.mean()) / (x.std() * y.std())
    return found


def _ranks(values: FloatArray) -> FloatArray:
    """Return ranks from 0; equal values share their mean rank."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: FloatArray = (np.cumsum(counts) - (counts + 1) / 2.0)[group]
    return ranks
