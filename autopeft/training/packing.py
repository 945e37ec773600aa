"""Packs the rows of a step, after a comparison with the same rows padded."""

from __future__ import annotations

import torch
from torch import nn

from autopeft.models.tuners.prompt import n_virtual_tokens
from autopeft.tasks.base import Task
from autopeft.tasks.batch import Batch, collate
from autopeft.tasks.data import TaskData
from autopeft.tasks.packing import IntArray, packed_batch, usual_bins
from autopeft.training.acceleration import TOLERANCE, verified
from autopeft.training.precision import Precision, autocast


class Packing:
    """Makes the batches of trainings on one model, with less padding.

    Belongs to a worker. If a check finds that losses differ, it warns once and turns itself off.

    Args:
        task: Computes the losses.
        data: The encoded data.
        device: Device of the model.
        precision: Precision of the trainings.

    Attributes:
        is_off: True if a check has failed.
    """

    def __init__(
        self, task: Task, data: TaskData, *, device: str = "cpu", precision: Precision = "fp32"
    ) -> None:
        self.is_off = False
        self._task = task
        self._data = data
        self._device = device
        self._precision: Precision = precision
        self._checked: set[frozenset[str]] = set()

    def batch(self, model: nn.Module, rows: IntArray) -> Batch:
        """Return training rows as a batch; padded where a prompt precedes each row."""
        padded = collate(self._data, "train", rows, self._device)
        if self.is_off or n_virtual_tokens(model):
            return padded
        lengths = self._data.train.lengths[rows]
        # Its kernels for rows of unlike length take them all as one.
        n_bins = 1 if _has_flash(model) else usual_bins(lengths)
        packed = packed_batch(self._data, "train", rows, n_bins, self._device)
        if packed.input_ids.numel() >= padded.input_ids.numel():
            return padded
        return packed if self._is_good(model, packed, padded) else padded

    def _is_good(self, model: nn.Module, packed: Batch, padded: Batch) -> bool:
        """Compare the losses of the rows, once per kind of adapter."""
        kinds = frozenset(type(module).__name__ for module in model.modules())
        if kinds in self._checked:
            return True
        self._checked.add(kinds)
        modes = [(module, module.training) for module in model.modules()]
        model.eval()  # Dropout would draw other numbers.
        try:
            with torch.no_grad(), autocast(self._precision, self._device):
                fast, plain = (self._task.row_losses(model, b)[0] for b in (packed, padded))
        finally:
            for module, mode in modes:
                module.training = mode
        what = f"sequence packing for {type(model).__name__}"
        self.is_off = not verified(fast, plain, TOLERANCE[self._precision], what=what)
        return not self.is_off


def _has_flash(model: nn.Module) -> bool:
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return str(name or "").startswith("flash")
