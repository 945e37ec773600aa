"""Prices training a model on the data of a search."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from autopeft.costs import PriceTable
from autopeft.models.attention import use_attention
from autopeft.models.backbone import Backbone, build_meta
from autopeft.models.layout import check_role_map
from autopeft.models.loading import base_dtype
from autopeft.preparing.notes import Note
from autopeft.preparing.windows import read_share
from autopeft.profiling.fake_tensors import InputShape
from autopeft.profiling.fits import Load
from autopeft.profiling.measure import price_table
from autopeft.profiling.output_positions import n_logit_weights
from autopeft.searcher.space.config import prompt_sizes
from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.tasks.data import TaskData
from autopeft.tasks.packing import packed_shape, usual_bins
from autopeft.training.activation_cache import MEMORY_SHARE, ActivationStore, room_on_disk
from autopeft.training.batching import training_batches
from autopeft.training.evaluation import token_budget
from autopeft.training.optimizers import moments_of
from autopeft.utils.hardware import available_memory_bytes, n_cores

PACKED_STEPS = 512
"""Steps whose packed rows are counted: their sizes differ as lengths do."""


def _can_cache(settings: SearchSettings, data: TaskData, meta: Backbone, note: Note) -> bool:
    """Return whether the activation cache can hold the training rows; say so if it cannot."""
    block = meta.topology.shape(0, "block")
    if not settings.activation_cache or not data.train.has_tokens or block is None:
        return settings.activation_cache and data.train.has_tokens
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    size = ActivationStore.size_of(data.train, block[1], dtype) / 2**30
    if size > settings.activation_cache_gb:
        has_room, limit = False, f"--activation-cache-gb allows {settings.activation_cache_gb:g}"
    else:
        has_room, limit = _has_room(settings, int(size * 2**30))
    if not has_room:
        note(f"the activation cache is off: the training rows need {size:.3g} GiB, {limit}")
    return has_room


def _has_room(settings: SearchSettings, size: int) -> tuple[bool, str]:
    """Return whether states have room on this machine's disk or in its memory, and what limits it.

    The workers of a cluster have disks of their own.
    """
    if settings.ray_address is not None:
        return True, ""
    folder = Path(tempfile.gettempdir())
    on_disk = room_on_disk(folder)
    share = MEMORY_SHARE / (settings.workers or n_cores())
    has_room = size <= max(on_disk, share * (available_memory_bytes() or 0))
    return has_room, f"{folder} and the memory have no room for them"


def meta_of(settings: SearchSettings, data: TaskData, task: Task) -> Backbone:
    """Build the model of a task without its weights."""
    meta = build_meta(
        settings.model,
        auto_class=task.auto_class,
        model_kwargs=task.model_kwargs(),
        revision=settings.model_revision,
        role_map=settings.role_map,
        quantization=settings.quantization,
        replaces_head=data.replaces_head,
    )
    check_role_map(meta.model, meta.layout, settings.role_map)
    if settings.attn_implementation == "eager":
        # It keeps every pair of tokens, and is priced so. The others need what SDPA needs.
        use_attention("eager", meta.model)
    return meta


def prices_of(
    meta: Backbone,
    settings: SearchSettings,
    data: TaskData,
    task: Task,
    source: str | Mapping[str, Any],
    window: str | None,
    device: str,
    note: Note = lambda _: None,
) -> PriceTable:
    """Price training the model on the data in batches of the settings' rows."""
    n_rows, per_row = settings.rows_per_step, data.train.sequences_per_row
    lengths = data.length_statistics(n_rows)
    mean_length, largest = lengths.mean_padded, None
    if settings.packing:
        mean_length, largest = _packed(data, n_rows, note)
    prices = price_table(
        meta,
        batch_size=n_rows * per_row,
        mean_length=mean_length,
        longest_length=lengths.longest,
        prompt_sizes=prompt_sizes(source),
        device=device,
        inputs=InputShape(data.input_shapes, lengths.source_share, lengths.target_share),
        dtype=base_dtype(device, settings.precision),
        packed=largest,
    )
    if per_row > 1:
        # Prices are by rows, whatever a row holds.
        longer = {size: replace(table, batch_size=n_rows) for size, table in prices.longer.items()}
        prices = replace(prices, batch_size=n_rows, longer=longer)
    return prices.as_trained(
        has_activation_cache=_can_cache(settings, data, meta, note),
        read_share=1.0 if window is None else read_share(task, data, window, settings),
        # Others compute all their logits.
        logit_weights=n_logit_weights(meta) if task.is_autoregressive else 0,
        logit_tokens=lengths.mean_targets * n_rows,
        most_logit_tokens=lengths.most_targets * n_rows if task.is_autoregressive else 0.0,
        scoring_tokens=_scoring_tokens(data, device, prices.vocabulary),
        has_checkpointing=settings.gradient_checkpointing is True,
        pass_tokens=settings.micro_batch_tokens,
        moments=moments_of(settings.optimizer),
    )


def _packed(data: TaskData, n_rows: int, note: Note) -> tuple[float, tuple[int, int]]:
    """Return the mean tokens of a packed row, and the sequences and tokens of the largest step."""
    batches = islice(training_batches(data.train.lengths, n_rows, 0), PACKED_STEPS)
    of_rows = [data.train.lengths[rows] for rows in batches]
    padded = [(len(each), int(each.max())) for each in of_rows]
    packed = [
        min(packed_shape(each, usual_bins(each)), whole, key=math.prod)
        for each, whole in zip(of_rows, padded, strict=True)
    ]
    n_packed, n_padded = (sum(map(math.prod, shapes)) for shapes in (packed, padded))
    note(
        f"packing: a step has {n_packed / len(packed):.0f} tokens in place of "
        f"{n_padded / len(packed):.0f}"
    )
    return n_packed / sum(map(len, of_rows)), max(packed, key=math.prod)


def load_of(settings: SearchSettings, data: TaskData, task: Task) -> Load:
    """Return what a training step on the data holds at most."""
    lengths, per_row = data.length_statistics(settings.rows_per_step), data.train.sequences_per_row
    share = lengths.most_targets / (lengths.longest * per_row)
    return Load(
        settings.rows_per_step,
        lengths.longest,
        longest=task.length_limit(),
        target_share=share if task.is_autoregressive else 0.0,
        sequences_per_row=per_row,
        inputs=InputShape(data.input_shapes, lengths.source_share, lengths.target_share),
    )


def _scoring_tokens(data: TaskData, device: str, vocabulary: int) -> int:
    """Return the padded tokens of the largest batch that is scored."""
    budget = token_budget(device, vocabulary)
    every = (data, *(second.data for second in data.second))
    splits = [
        rows
        for each in every
        for name, rows in each.splits.items()
        if name != "train" and len(rows)
    ]
    longest = max(int(rows.lengths.max()) for rows in splits)
    whole = max(int(rows.lengths.max()) * len(rows) for rows in splits)
    return max(longest, min(budget, whole))
