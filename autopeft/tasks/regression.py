"""Regression: predicts a number for each text, or for each pair of texts."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch

from autopeft.errors import DataError
from autopeft.models.output_scale import has_output_bias
from autopeft.tasks.base import IntArray, Scores, Task
from autopeft.tasks.batch import Batch
from autopeft.tasks.columns import Column
from autopeft.tasks.data import EncodedSplit, OutputScale, SplitName, TaskData
from autopeft.tasks.encoding import encode_texts
from autopeft.tasks.examples import Examples, is_missing
from autopeft.tasks.metrics import Needs
from autopeft.tasks.reading import Table
from autopeft.tasks.text_classification import LABEL_NAMES, TextClassification, row_logits

_NUMBER_NAMES = (
    *("score", "similarity_score", "similarity", "relatedness_score"),
    *("rating", "value", "number"),
)
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
    metrics = ("pearson", "spearman", "mse", "mae", "r2", "loss")
    predicts: ClassVar[tuple[Needs, ...]] = ("values",)
    scale: OutputScale = OutputScale()
    is_off_center: bool = False
    """Whether the numbers are farther from 0 than from each other, and the head has no bias."""

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
                    "label", name, f"row {row + 1} is {values[row]!r}", "give finite numbers"
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

    def replaces_head(self, labels: tuple[str, ...]) -> bool:
        """Return whether the checkpoint has no head with one output."""
        config = self.model_config
        return not self.has_head(config) or getattr(config, "num_labels", 0) != 1

    def output_scale(self, splits: Mapping[SplitName, Examples]) -> OutputScale:
        """Return mean and deviation of the training rows, as far as the head can express them."""
        config = self.model_config
        if not self.replaces_head(()):
            return OutputScale()
        values = np.asarray(splits["train"]["label"], dtype=np.float64)
        mean, deviation = float(values.mean()), float(values.std())
        if config is not None and has_output_bias(config, self.auto_class):
            return OutputScale(mean, deviation or 1.0)
        self.is_off_center = abs(mean) > deviation
        return OutputScale(0.0, float(np.sqrt(np.mean(values**2))) or 1.0)

    def notes(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """Say so if the checkpoint's head is replaced, or cannot add the mean of the numbers."""
        notes = []
        n_outputs = getattr(self.model_config, "num_labels", 1)
        if self.has_head(self.model_config) and self.replaces_head(labels):
            notes.append(f"the model's head has {n_outputs} outputs, not one; a new one is trained")
        if self.is_off_center:
            notes.append(
                "the model's head has no bias, so numbers far from 0 are learned slowly; subtract "
                "their mean in the data, or use an encoder"
            )
        return tuple(notes)

    def encode(
        self, processor: Any, rows: Examples, labels: tuple[str, ...], max_length: int
    ) -> EncodedSplit:
        """Tokenize texts or pairs; "labels" is each row's number, float32, in its own unit."""
        return encode_texts(
            processor,
            rows,
            np.asarray(rows["label"], np.float32),
            max_length,
            on_long=self.settings.on_long,
        )

    def bound(self, data: TaskData) -> Self:
        """Return the task for encoded data, ready to compute losses and scores."""
        twin = super().bound(data)
        twin.scale = data.output_scale or OutputScale()
        return twin

    pipeline_arguments = ', function_to_apply="none"'

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

    def outputs(
        self, needs: Needs, scores: Scores, split: EncodedSplit, rows: IntArray
    ) -> tuple[Any, Any]:
        """Return each row's number and the predicted one, in the data's own unit."""
        return split.row_arrays["labels"][rows].astype(np.float64), scores["prediction"]
