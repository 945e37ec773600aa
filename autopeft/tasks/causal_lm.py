"""Supervised fine-tuning of a decoder: learns completions of prompts."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from autopeft.costs.objectives import objective
from autopeft.errors import TrainingFailure
from autopeft.settings import SearchSettings
from autopeft.tasks.base import BatchScores, Evaluation, SplitScores, choose_quality
from autopeft.tasks.batch import Batch, Window
from autopeft.tasks.data import EncodedSplit, SplitName, TaskData
from autopeft.tasks.encoding import encode_prompts
from autopeft.tasks.rows import Rows, as_texts

if TYPE_CHECKING:
    from autopeft.tasks.reading import Table

MAX_STRATA = 20
"""Splits balance the completions if there are at most this many different ones."""


class CausalLM:
    """Next-token prediction on completions; prompts add no loss.

    Args:
        metric: Quality to optimize: loss (default), perplexity or token_accuracy.
    """

    name = "causal-lm"
    auto_class = "AutoModelForCausalLM"
    metrics = tuple(objective(name) for name in ("loss", "perplexity", "token_accuracy"))

    def __init__(self, metric: str | None = None) -> None:
        self.quality = choose_quality(self.name, metric, self.metrics)

    @staticmethod
    def target_column(settings: SearchSettings) -> tuple[str, str]:
        """Return the setting and the column with the completions."""
        return "completion", settings.completion

    @staticmethod
    def clean(settings: SearchSettings, table: Table) -> Rows:
        """Return the rows that have a completion; a prompt may be empty."""
        target = as_texts(table.column("completion", settings.completion))
        first = as_texts(table.column("prompt", settings.prompt))
        return Rows.kept(first, None, target, [bool(t.strip()) for t in target], table.source)

    @staticmethod
    def strata(rows: Rows) -> Sequence[Hashable]:
        """Return the completions if they are few, else one stratum."""
        return rows.target if len(set(rows.target)) <= MAX_STRATA else [0] * len(rows)

    @staticmethod
    def check_rows(settings: SearchSettings, rows: Rows) -> None:
        """Accept any completions."""

    @staticmethod
    def labels_of(splits: Mapping[SplitName, Rows]) -> tuple[str, ...]:
        """Return no labels."""
        return ()

    @staticmethod
    def encode(
        tokenizer: Any, rows: Rows, labels: tuple[str, ...], max_length: int
    ) -> EncodedSplit:
        """Tokenize prompts and completions; the target is the length of the prompt."""
        return encode_prompts(tokenizer, rows, max_length)

    @classmethod
    def from_data(cls, data: TaskData, metric: str | None) -> CausalLM:
        """Return the task for encoded data."""
        return cls(metric)

    def model_kwargs(self) -> dict[str, Any]:
        """Return nothing: a decoder needs no arguments."""
        return {}

    def windows(self, batch: Batch) -> dict[str, Window]:
        """Return the positions that predict completion tokens; size: the longest completion."""
        length = batch.input_ids.shape[1]
        begin = batch.targets.clamp(min=1) - 1  # (b,)
        n_tokens = batch.attention_mask.sum(dim=1)
        size = max(1, int((n_tokens - 1 - begin).max()))
        return {"completion": Window(begin.clamp(max=length - size), size)}

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy over the completion tokens of the batch."""
        logits, targets, _ = _completion_logits(model, batch)
        return functional.cross_entropy(logits, targets)

    def losses(self, model: torch.nn.Module, batch: Batch, n_parts: int) -> torch.Tensor:
        """Return the mean cross-entropy over the completion tokens of each part."""
        logits, targets, owner = _completion_logits(model, batch)
        part = owner // (len(batch.rows) // n_parts)
        return torch.stack(
            [
                functional.cross_entropy(logits[part == index], targets[part == index])
                for index in range(n_parts)
            ]
        )

    def score(self, model: torch.nn.Module, batch: Batch) -> BatchScores:
        """Return the summed loss and the number of correct tokens of each row."""
        logits, targets, owner = _completion_logits(model, batch)
        losses = functional.cross_entropy(logits, targets, reduction="none")
        right = logits.argmax(dim=-1) == targets
        empty = torch.zeros(len(batch.rows), device=losses.device)
        correct = empty.index_add(0, owner, right.float())
        return BatchScores(
            losses=empty.index_add(0, owner, losses),
            weights=empty.index_add(0, owner, torch.ones_like(losses)),
            correct=correct,
            predictions=correct.long(),
        )

    def summarize(self, scores: SplitScores) -> Evaluation:
        """Return loss, perplexity and accuracy over all completion tokens of the split.

        The quality of a row is its share of correct tokens if the metric is token_accuracy, else
        minus its mean loss.
        """
        n_tokens = float(scores.weights.sum())
        loss = float(scores.losses.sum()) / n_tokens
        metrics = {
            "loss": loss,
            # A float overflows beyond e^700; such a model is useless in any case.
            "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": float(scores.correct.sum()) / n_tokens,
        }
        is_accuracy = self.quality.name == "token_accuracy"
        per_row = scores.correct if is_accuracy else -scores.losses
        return Evaluation(loss, metrics, per_row / np.maximum(scores.weights, 1.0))


def _completion_logits(
    model: torch.nn.Module, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute logits only at positions that predict a completion token.

    Returns:
        Logits, shape (n, vocabulary), float32; the tokens to predict, shape (n,); and the batch
        row of each, shape (n,).
    """
    length = batch.input_ids.shape[1]
    columns = torch.arange(length, device=batch.input_ids.device)
    # Column j predicts token j + 1; nothing predicts a text's first token.
    starts = batch.targets.clamp(min=1)[:, None]  # (b, 1)
    is_target = (columns >= starts) & batch.attention_mask.bool()  # (b, t)
    owner, column = is_target.nonzero(as_tuple=True)  # (n,), (n,)
    with _only_at(model, owner, column - 1):
        logits: torch.Tensor = model(**batch.model_inputs(), use_cache=False).logits
    if logits.shape[0] != 1 or logits.shape[1] != len(owner):
        raise TrainingFailure(
            f"{type(model).__name__} does not compute its logits with its output embedding; "
            "autopeft cannot skip the logits of the prompt"
        )
    return logits[0].float(), batch.input_ids[owner, column], owner


@contextmanager
def _only_at(model: torch.nn.Module, rows: torch.Tensor, columns: torch.Tensor) -> Iterator[None]:
    """Pass only these positions to the output embedding, as one row of shape (1, n, width).

    Logits of all prompt positions would cost more than the rest of a small decoder. What a model
    does after the embedding (scaling, soft-capping) is elementwise, so it still works.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]

    def pick(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (inputs[0][rows, columns][None],)

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()
