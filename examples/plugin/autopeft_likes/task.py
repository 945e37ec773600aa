"""A task: counts, learned by a Poisson regression."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import autopeft


class Likes(autopeft.Task):
    """The number of likes of each post."""

    name = "likes"
    description = "the number of likes of each post"
    columns = (
        autopeft.Column("text", "text", "the post", names=("post",)),
        autopeft.Column("count", "number", "its likes", names=("likes", "claps")),
    )
    target = "count"
    identity = ("text",)  # equal texts never fall into different splits
    auto_class = "AutoModelForSequenceClassification"
    metrics = ("mae", "rmse", "loss")
    predicts = ("values",)

    def encode(
        self, processor: Any, rows: autopeft.Examples, labels: tuple[str, ...], max_length: int
    ) -> autopeft.EncodedSplit:
        """Encode the posts; the counts are numbers beside them."""
        counts = np.asarray(rows["count"], dtype=np.float32)
        on_long = self.settings.on_long
        return autopeft.encode_texts(processor, rows, counts, max_length, on_long=on_long)

    def model_kwargs(self) -> dict[str, Any]:
        """Return what the model is loaded with: one output, the logarithm of the count."""
        return {"num_labels": 1, "pad_token_id": self.pad_id}

    def row_losses(
        self, model: torch.nn.Module, batch: autopeft.Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each row, and ones: each row counts once."""
        losses = self._losses(self._rates(model, batch), batch)
        return losses, torch.ones_like(losses)

    def score(self, model: torch.nn.Module, batch: autopeft.Batch) -> Mapping[str, torch.Tensor]:
        """Return the same, and what is predicted."""
        rates = self._rates(model, batch)
        losses = self._losses(rates, batch)
        return {"loss": losses, "weight": torch.ones_like(losses), "count": rates.exp()}

    def outputs(self, needs: Any, scores: Any, split: Any, rows: Any) -> tuple[Any, Any]:
        """Return what is right and what was predicted, for metrics of numbers."""
        return split.row_arrays["labels"][rows], scores["count"]

    def _rates(self, model: torch.nn.Module, batch: autopeft.Batch) -> torch.Tensor:
        logits: torch.Tensor = model(**batch.model_inputs()).logits
        return logits.float().squeeze(-1)

    def _losses(self, rates: torch.Tensor, batch: autopeft.Batch) -> torch.Tensor:
        return torch.nn.functional.poisson_nll_loss(rates, batch.labels, reduction="none")
