"""Text classification: single texts or pairs, one label each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from autopeft.costs.objectives import objective
from autopeft.tasks.base import BatchScores, Evaluation, SplitScores, choose_quality
from autopeft.tasks.batch import Batch, Window


class TextClassification:
    """One label a text.

    Args:
        labels: Label names in the order of their index.
        pad_id: The padding token.
        metric: Quality to search for: accuracy (default), f1, matthews or loss.
    """

    name = "text-classification"
    auto_class = "AutoModelForSequenceClassification"
    metrics = tuple(objective(name) for name in ("accuracy", "f1", "matthews", "loss"))

    def __init__(self, labels: tuple[str, ...], pad_id: int, metric: str | None = None) -> None:
        self.labels = labels
        self.pad_id = pad_id
        self.quality = choose_quality(self.name, metric, self.metrics)

    def model_kwargs(self) -> dict[str, Any]:
        """Size of the head, label names, and the padding token.

        A decoder's classifier reads the last token that is not padding, so it must be told which
        token that is; many decoders come without one.
        """
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "pad_token_id": self.pad_id,
        }

    def windows(self, batch: Batch) -> dict[str, Window]:
        """The first token, as most encoders do, or the last that is not padding, as decoders do."""
        is_token = batch.input_ids != self.pad_id
        columns = torch.arange(batch.input_ids.shape[1], device=is_token.device)
        last = (columns * is_token).argmax(dim=1)  # (b,)
        return {"first": Window(torch.zeros_like(last), 1), "last": Window(last, 1)}

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy of the batch's rows."""
        return functional.cross_entropy(_logits(model, batch), batch.targets)

    def losses(self, model: torch.nn.Module, batch: Batch, n_parts: int) -> torch.Tensor:
        """Mean cross-entropy of the rows of each part."""
        parts = zip(_logits(model, batch).chunk(n_parts), batch.targets.chunk(n_parts), strict=True)
        return torch.stack([functional.cross_entropy(*part) for part in parts])

    def score(self, model: torch.nn.Module, batch: Batch) -> BatchScores:
        """Loss and predicted label of each row."""
        logits = _logits(model, batch)
        predictions = logits.argmax(dim=-1)  # (b,)
        return BatchScores(
            losses=functional.cross_entropy(logits, batch.targets, reduction="none"),
            weights=torch.ones_like(batch.targets),
            correct=predictions == batch.targets,
            predictions=predictions,
        )

    def summarize(self, scores: SplitScores) -> Evaluation:
        """Accuracy, macro F1 and Matthews correlation; a row is 1 if right, else 0.

        Where the quality is the loss, a row's quality is minus its loss.
        """
        # Slow to import, and no step of a training needs it.
        from sklearn.metrics import f1_score, matthews_corrcoef

        loss = float(scores.losses.mean())
        every = np.arange(len(self.labels))
        metrics = {
            "accuracy": float(scores.correct.mean()),
            "f1": float(
                f1_score(
                    scores.targets,
                    scores.predictions,
                    labels=every,
                    average="macro",
                    zero_division=0.0,
                )
            ),
            "matthews": float(matthews_corrcoef(scores.targets, scores.predictions)),
            "loss": loss,
        }
        rows = -scores.losses if self.quality.name == "loss" else scores.correct
        return Evaluation(loss, metrics, rows)


def _logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Shape (b, n_labels), float32 whatever the model computes in."""
    logits: torch.Tensor = model(**batch.model_inputs()).logits
    return logits.float()
