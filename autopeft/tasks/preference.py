"""Preference tuning of a decoder: the chosen answer of a pair becomes likelier than the rejected.

Sources: DPO, Rafailov et al. (arXiv 2305.18290); IPO, Azar et al. (arXiv 2310.12036); SimPO, Meng
et al. (arXiv 2405.14734); ORPO, Hong et al. (arXiv 2403.07691).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from autopeft.errors import SettingsError
from autopeft.tasks.base import FloatArray, Scores, Task
from autopeft.tasks.batch import Batch, collate
from autopeft.tasks.chat_encoding import encode_preferences
from autopeft.tasks.columns import Column
from autopeft.tasks.conversations import read_rows, row_key
from autopeft.tasks.data import EncodedSplit, SplitName, TaskData
from autopeft.tasks.decoder import DecoderTask, learned_logits
from autopeft.tasks.encoding import flat, split_of
from autopeft.tasks.examples import Examples
from autopeft.tasks.metrics import Needs
from autopeft.tasks.reading import Table

LOSSES = ("dpo", "ipo", "simpo", "orpo")

_NEED_REFERENCE = ("dpo", "ipo")
_USE_MEANS = ("ipo", "simpo", "orpo")
"""Losses of the mean, not the sum, of an answer's log-probabilities."""

_TIE = 1e-3
"""Log-probabilities closer than this are equal: in other batches, sums are rounded differently."""

_REFERENCE_ROWS = 8


class Preference(DecoderTask):
    """Learns which of two answers is better.

    Options: `loss` (dpo, ipo, simpo or orpo), `beta` (0.1), `gamma` (simpo's target margin, 0.5).
    The log-probabilities of the reference, the base model without adapters, are computed once.
    ORPO's likelihood term is the mean over the tokens of the chosen answer.

    Args:
        labels: Not used.
        pad_id: Id of the padding token.
        metric: Quality to optimize: preference_accuracy (default), margin or loss.
    """

    name = "preference"
    description = "which of two answers is better (DPO, IPO, SimPO, ORPO)"
    columns = (
        Column("chosen", "any", "the better answer, text or messages", names=("preferred",)),
        Column("rejected", "any", "the worse answer, text or messages"),
        Column("prompt", "any", "the prompt of both, unless they contain it", False),
        Column("tools", "any", "JSON schemas of tools", False),
        Column("template_options", "any", "arguments for the chat template", False),
    )
    target = "chosen"
    identity = ("key",)
    sequence_names = ("chosen", "rejected")
    metrics = ("preference_accuracy", "margin", "loss")
    predicts: ClassVar[tuple[Needs, ...]] = ()
    space = "preference"
    # In bf16, rounding depends on the batch: the base model had an accuracy of 0.6 against itself.
    auto_precision: ClassVar[str] = "fp32"
    options: ClassVar[Mapping[str, Any]] = {"loss": "dpo", "beta": 0.1, "gamma": 0.5}

    def check_options(self) -> None:
        """Raise a SettingsError if an option has an impossible value."""
        if self.option("loss") not in LOSSES:
            raise SettingsError(
                "task_options.loss",
                self.option("loss"),
                "no such loss",
                f"use one of {', '.join(LOSSES)}",
            )
        for name in ("beta", "gamma"):
            value = self.option(name)
            if not isinstance(value, int | float) or not value > 0:
                raise SettingsError(
                    f"task_options.{name}", value, "must be a number above 0", "use e.g. 0.1"
                )

    def clean(self, table: Table) -> Examples:
        """Return the pairs that can be learned from, each as what it means."""
        names = self.find_columns(self.settings.column_names(), table)
        values = {role: table.column(role, name) for role, name in names.items()}
        found = read_rows(values, names, source=table.source)
        return Examples(
            {"row": found.rows, "key": tuple(map(row_key, found.rows))},
            found.source_rows,
            table.source,
            found.dropped,
            table.notes,
        )

    def encode(
        self, processor: Any, rows: Examples, labels: tuple[str, ...], max_length: int
    ) -> EncodedSplit:
        """Tokenize both answers after the prompt: two sequences a row, the chosen one first."""
        found = encode_preferences(
            processor,
            rows["row"],
            max_length,
            on_long="drop" if self.settings.on_long == "drop" else "cut",
            numbers=(rows.source_rows + 1).tolist(),
            column=rows.source,
            role="data",
        )
        learned = [row.labels.tolist() for row in found.rows]
        return split_of(
            rows.take(found.kept),
            [row.ids.tolist() for row in found.rows],
            token_arrays={"labels": flat(learned).astype(np.int32)},
            sequences_per_row=2,
            n_truncated=found.n_cut,
            dropped=found.dropped,
            notes=found.notes,
        )

    def on_base_model(
        self, model: torch.nn.Module, data: TaskData, device: str | torch.device
    ) -> TaskData:
        """Return the data with the reference's log-probabilities, if the loss compares with it."""
        if self.option("loss") not in _NEED_REFERENCE:
            return data
        splits: dict[SplitName, EncodedSplit] = {}
        model.eval()
        with torch.no_grad():
            for name, split in data.splits.items():
                found = np.empty((len(split), 2), dtype=np.float32)
                order = np.argsort(split.lengths, kind="stable")
                for start in range(0, len(order), _REFERENCE_ROWS):
                    rows = order[start : start + _REFERENCE_ROWS]
                    batch = collate(data, name, rows, device)
                    found[rows] = self._log_probabilities(model, batch).cpu().numpy()
                splits[name] = replace(split, row_arrays={**split.row_arrays, "reference": found})
        return replace(data, splits=splits)

    def row_losses(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each pair, and ones."""
        losses, _ = self._compared(model, batch)
        return losses, torch.ones_like(losses)

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean loss of the batch's pairs."""
        return self.row_losses(model, batch)[0].mean()

    def probe_loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the sum of all log-probabilities, which needs no reference."""
        return self._log_probabilities(model, batch).sum()

    def score(self, model: torch.nn.Module, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Return the loss and the margin of each pair."""
        losses, margins = self._compared(model, batch)
        return {"loss": losses, "weight": torch.ones_like(losses), "margin": margins}

    def loss_metric(self, name: str, scores: Scores) -> tuple[float, FloatArray]:
        """Return the share of pairs with a positive margin, the mean margin or the loss.

        The quality of a row is 1 if its margin is positive, 0 if negative and one half if there is
        none, as of a model without adapters; or its margin, or minus its loss.
        """
        if name == "loss":
            return Task.loss_metric(self, name, scores)
        margins: FloatArray = scores["margin"]
        if name == "preference_accuracy":
            is_tie = np.abs(margins) < _TIE * float(self.option("beta"))
            margins = np.where(is_tie, 0.5, margins > 0)
        return float(margins.mean()), margins

    def _log_probabilities(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the log-probability of both answers, shape (b, 2): sums, or means over tokens."""
        logits, targets, owner = learned_logits(model, batch)
        log_p = -functional.cross_entropy(logits, targets, reduction="none")
        empty = torch.zeros(len(batch.sequences), device=log_p.device)
        sums = empty.index_add(0, owner, log_p)
        if self.option("loss") in _USE_MEANS:
            sums = sums / empty.index_add(0, owner, torch.ones_like(log_p)).clamp(min=1.0)
        return sums.view(-1, 2)

    def _compared(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss and the margin of each pair, both of shape (b,)."""
        loss, beta = self.option("loss"), float(self.option("beta"))
        log_p = self._log_probabilities(model, batch)
        if loss in _NEED_REFERENCE:
            log_p = log_p - batch["reference"]
        difference = log_p[:, 0] - log_p[:, 1]
        margins = beta * difference.detach()
        if loss == "dpo":
            return -functional.logsigmoid(beta * difference), margins
        if loss == "ipo":
            return (difference - 1.0 / (2.0 * beta)) ** 2, margins
        if loss == "simpo":
            gamma = float(self.option("gamma"))
            return -functional.logsigmoid(beta * difference - gamma), margins
        # Log odds: log p - log(1 - p). A probability that rounds to 1 has no finite odds.
        others = torch.log1p(-torch.exp(log_p.clamp(max=-1e-6)))
        odds = difference - (others[:, 0] - others[:, 1])
        return -log_p[:, 0] - beta * functional.logsigmoid(odds), margins
