"""Finds which of a task's windows the model's head reads."""

from __future__ import annotations

from itertools import islice

import numpy as np

from autopeft.models.backbone import Backbone
from autopeft.profiling.output_positions import read_positions
from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.tasks.batch import collate
from autopeft.tasks.data import TaskData
from autopeft.tasks.packing import packed_batch, usual_bins
from autopeft.training.batching import training_batches


def read_window(meta: Backbone, task: Task, data: TaskData) -> str | None:
    """Return which of the task's windows holds all hidden states that the model's head reads.

    None where the head reads other states too, or it is unknown. A few rows of `data` are tried.
    """
    if not data.train.has_tokens:
        return None
    # Short and long rows: in rows of one length several windows coincide.
    order = np.argsort(data.train.lengths, kind="stable")
    batch = collate(data, "train", np.unique(np.concatenate([order[:2], order[-2:]])))
    rows, length = batch.input_ids.shape
    read = read_positions(meta, lambda model: task.probe_loss(model, batch), rows, length)
    if read is None:
        return None
    fitting = [
        name
        for name, window in task.windows(batch).items()
        if not bool((read & ~window.mask(length)).any())
    ]
    return fitting[0] if len(fitting) == 1 else None


def read_share(task: Task, data: TaskData, window: str, settings: SearchSettings) -> float:
    """Return the share of tokens (padding included) of training batches inside a window."""
    n_read = n_tokens = 0
    for rows in islice(training_batches(data.train.lengths, settings.rows_per_step, 0), 32):
        if settings.packing:
            batch = packed_batch(data, "train", rows, usual_bins(data.train.lengths[rows]))
        else:
            batch = collate(data, "train", rows)
        n_read += len(batch.input_ids) * task.windows(batch)[window].size
        n_tokens += batch.input_ids.numel()
    return n_read / n_tokens
