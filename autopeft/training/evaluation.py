"""Scores a split in large batches, without gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autopeft.models.attention import attention_in
from autopeft.tasks.base import Evaluation, Task
from autopeft.tasks.batch import collate
from autopeft.tasks.data import EncodedSplit, SplitName, TaskData
from autopeft.training.batching import IntArray, evaluation_batches, rung_sample
from autopeft.training.precision import Precision, autocast, rounded_once
from autopeft.training.setup import TrainingSetup
from autopeft.utils.device import kind_of

TOKEN_BUDGET = {"cpu": 1024, "accelerator": 65536}
"""Padded tokens of an evaluation batch: enough to keep the device busy, but small in memory. On a
CPU, short texts are scored a fifth faster than with 4,096: there is less padding, and activations
stay in its caches."""


_LOGIT_BUDGET = 2**29
"""Logits of an evaluation batch: 2 GiB in fp32, and as much twice more for a moment."""


def token_budget(device: str, vocabulary: int = 0) -> int:
    """Return the padded tokens of an evaluation batch on a device.

    Args:
        device: As torch names it.
        vocabulary: Logits of a token; 0 for a model without an output embedding.
    """
    tokens = TOKEN_BUDGET[kind_of(device)]
    return min(tokens, _LOGIT_BUDGET // vocabulary) if vocabulary else tokens


def vocabulary_of(model: torch.nn.Module) -> int:
    """Return the logits of a token, 0 for a model without an output embedding."""
    found: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return 0 if found is None else int(found.weight.shape[0])


def evaluate(
    model: torch.nn.Module,
    setup: TrainingSetup,
    split: SplitName,
    *,
    rows: IntArray | None = None,
    with_text: bool = True,
    n_draws: int = 0,
) -> Evaluation:
    """Score the rows of a split. The model is in evaluation mode afterwards.

    Args:
        model: Model with its adapters.
        setup: Task, data and precision.
        split: Name of the split.
        rows: Positions in the split, each once, and the order of the result's `rows`; None: all.
        with_text: Whether text is generated, if a metric of the task needs it.
        n_draws: Resamples of the rows, for a quality that is no mean over them.
    """
    model.eval()
    device, source = setup.device, setup.data.splits[split]
    wanted = np.arange(len(source), dtype=np.int64) if rows is None else rows
    order: list[IntArray] = []
    scored: list[Mapping[str, torch.Tensor]] = []
    budget = token_budget(device, vocabulary_of(model))
    waiting = list(evaluation_batches(source.lengths[wanted], budget))[::-1]
    with (
        torch.inference_mode(),
        rounded_once(model, setup.precision, device),
        attention_in(setup.precision, model),
    ):
        while waiting:
            places = waiting.pop()
            try:
                scores = _score(model, setup, split, wanted[places])
            except torch.OutOfMemoryError:
                if len(places) == 1:
                    raise
                # The longest rows come first, so what is left needs no further halving.
                waiting = [half for rest in (*waiting, places) for half in _halves(rest)]
                continue
            scored.append(scores)
            order.append(places)
        generated = None
        if with_text and setup.task.needs_text():
            sample = rung_sample(len(wanted), setup.task.settings.generation_rows)
            chosen = wanted if sample is None else wanted[sample]
            with autocast(setup.precision, device):
                generated = setup.task.generate(model, setup.data, split, chosen, device)
    joined = _joined(np.concatenate(order), scored)
    return setup.task.summarize(joined, source, wanted, generated=generated, n_draws=n_draws)


def with_base_model(
    model: torch.nn.Module,
    task: Task,
    data: TaskData,
    device: str,
    precisions: Mapping[SplitName, Precision],
) -> TaskData:
    """Return the data with what the base model tells, each split in its own precision.

    Args:
        model: The base model without adapters.
        task: Asks it, see `Task.on_base_model`.
        data: The encoded data.
        device: Device of the model.
        precisions: Split -> precision in which it is scored.
    """
    splits: dict[SplitName, EncodedSplit] = {}
    for name, split in data.splits.items():
        way = precisions[name]
        with autocast(way, device), rounded_once(model, way, device), attention_in(way, model):
            found = task.on_base_model(model, replace(data, splits={name: split}), device)
        splits[name] = found.splits[name]
    return replace(data, splits=splits)


def _score(
    model: torch.nn.Module, setup: TrainingSetup, split: SplitName, rows: IntArray
) -> Mapping[str, torch.Tensor]:
    batch = collate(setup.data, split, rows, setup.device)
    with setup.forward(batch):
        return setup.task.score(model, batch)


def _halves(rows: IntArray) -> list[IntArray]:
    """Return the second and the first half of rows; one row stays whole."""
    half = (len(rows) + 1) // 2
    return [part for part in (rows[half:], rows[:half]) if len(part)]


def _joined(
    order: IntArray, scored: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, NDArray[Any]]:
    """Concatenate the scores and restore the order of the rows."""
    joined = {}
    for name in scored[0]:
        values = torch.cat([scores[name] for scores in scored]).cpu().numpy()
        if np.issubdtype(values.dtype, np.floating):
            values = values.astype(np.float64)
        joined[name] = np.empty_like(values)
        joined[name][order] = values
    return joined
