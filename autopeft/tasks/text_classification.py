"""Classification of texts or pairs of texts, one label each."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from autopeft.costs.objectives import objective
from autopeft.errors import DataError
from autopeft.settings import SearchSettings
from autopeft.tasks.base import BatchScores, Evaluation, SplitScores, choose_quality
from autopeft.tasks.batch import Batch, Window
from autopeft.tasks.data import SPLITS, EncodedSplit, SplitName, TaskData
from autopeft.tasks.encoding import encode_texts
from autopeft.tasks.rows import Rows, as_texts

if TYPE_CHECKING:
    from autopeft.tasks.reading import Table


class TextClassification:
    """Predicts one label per text.

    Args:
        labels: Label names in the order of their index.
        pad_id: Id of the padding token.
        metric: Quality to optimize: accuracy (default), f1, matthews or loss.
    """

    name = "text-classification"
    auto_class = "AutoModelForSequenceClassification"
    metrics = tuple(objective(name) for name in ("accuracy", "f1", "matthews", "loss"))

    def __init__(self, labels: tuple[str, ...], pad_id: int, metric: str | None = None) -> None:
        self.labels = labels
        self.pad_id = pad_id
        self.quality = choose_quality(self.name, metric, self.metrics)

    @staticmethod
    def target_column(settings: SearchSettings) -> tuple[str, str]:
        """Return the setting and the column with the labels."""
        return "label", settings.label

    @staticmethod
    def clean(settings: SearchSettings, table: Table) -> Rows:
        """Return the rows that have a text, a label and, for pairs, a second text."""
        target = [label.strip() for label in as_texts(table.column("label", settings.label))]
        first = as_texts(table.column("text", settings.text))
        keep = [bool(t.strip() and label) for t, label in zip(first, target, strict=True)]
        second = None
        if settings.text_pair is not None:
            second = as_texts(table.column("text_pair", settings.text_pair))
            keep = [ok and bool(t.strip()) for ok, t in zip(keep, second, strict=True)]
        return Rows.kept(first, second, target, keep, table.source)

    @staticmethod
    def strata(rows: Rows) -> Sequence[Hashable]:
        """Return the labels."""
        return rows.target

    @staticmethod
    def check_rows(settings: SearchSettings, rows: Rows) -> None:
        """Raise a DataError if the labels of the training source cannot be classes."""
        labels = set(rows.target)
        if len(labels) == 1:
            raise DataError(
                "label",
                settings.label,
                f"the column has one class only ({labels.pop()!r})",
                "give rows of at least two classes",
            )
        if labels and len(labels) > len(rows) / 2:
            raise DataError(
                "label",
                settings.label,
                f"the column has {len(labels)} different values in {len(rows)} rows",
                "name a column with classes, not with numbers or free text",
            )

    @staticmethod
    def labels_of(splits: Mapping[SplitName, Rows]) -> tuple[str, ...]:
        """Return the labels of the training rows.

        Raises:
            DataError: if another split has a label that they lack.
        """
        labels = set(splits["train"].target)
        for name in SPLITS:
            unknown = sorted(set(splits[name].target) - labels)
            if unknown:
                raise DataError(
                    "label",
                    unknown[0],
                    f"occurs in {name} but in no training row",
                    "add training rows with it, or drop it",
                )
        return tuple(sorted(labels, key=_label_order))

    @staticmethod
    def encode(
        tokenizer: Any, rows: Rows, labels: tuple[str, ...], max_length: int
    ) -> EncodedSplit:
        """Tokenize texts or pairs; the target is the index of the label."""
        index = {label: i for i, label in enumerate(labels)}
        targets = np.asarray([index[label] for label in rows.target], dtype=np.int64)
        return encode_texts(tokenizer, rows, targets, max_length)

    @classmethod
    def from_data(cls, data: TaskData, metric: str | None) -> TextClassification:
        """Return the task for encoded data."""
        return cls(data.labels, data.pad_id, metric)

    def model_kwargs(self) -> dict[str, Any]:
        """Return size of the head, label names and padding token.

        A decoder's classifier reads the last token that is not padding, so it must know the padding
        token; many decoders define none.
        """
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "pad_token_id": self.pad_id,
        }

    def windows(self, batch: Batch) -> dict[str, Window]:
        """Return the first token (most encoders) and the last that is not padding (decoders)."""
        is_token = batch.input_ids != self.pad_id
        columns = torch.arange(batch.input_ids.shape[1], device=is_token.device)
        last = (columns * is_token).argmax(dim=1)  # (b,)
        return {"first": Window(torch.zeros_like(last), 1), "last": Window(last, 1)}

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy of the batch's rows."""
        return functional.cross_entropy(_logits(model, batch), batch.targets)

    def losses(self, model: torch.nn.Module, batch: Batch, n_parts: int) -> torch.Tensor:
        """Return the mean cross-entropy of the rows of each part."""
        parts = zip(_logits(model, batch).chunk(n_parts), batch.targets.chunk(n_parts), strict=True)
        return torch.stack([functional.cross_entropy(*part) for part in parts])

    def score(self, model: torch.nn.Module, batch: Batch) -> BatchScores:
        """Return the loss and the predicted label of each row."""
        logits = _logits(model, batch)
        predictions = logits.argmax(dim=-1)  # (b,)
        return BatchScores(
            losses=functional.cross_entropy(logits, batch.targets, reduction="none"),
            weights=torch.ones_like(batch.targets),
            correct=predictions == batch.targets,
            predictions=predictions,
        )

    def summarize(self, scores: SplitScores) -> Evaluation:
        """Return accuracy, macro F1, Matthews correlation and loss.

        The quality of a row is minus its loss if the metric is the loss, else 1 if correct and 0 if
        not.
        """
        # Slow to import, and training steps do not need it.
        from sklearn.metrics import f1_score, matthews_corrcoef

        loss = float(scores.losses.mean())
        every = np.arange(len(self.labels))
        pair = (scores.targets, scores.predictions)
        metrics = {
            "accuracy": float(scores.correct.mean()),
            "f1": float(f1_score(*pair, labels=every, average="macro", zero_division=0.0)),
            "matthews": float(matthews_corrcoef(*pair)),
            "loss": loss,
        }
        rows = -scores.losses if self.quality.name == "loss" else scores.correct
        return Evaluation(loss, metrics, rows)


def _logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the logits, shape (b, n_labels), float32 in any precision."""
    logits: torch.Tensor = model(**batch.model_inputs()).logits
    return logits.float()


def _label_order(label: str) -> tuple[int, float, str]:
    """Sort numbers by value and before words, so that "10" follows "9"."""
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label
