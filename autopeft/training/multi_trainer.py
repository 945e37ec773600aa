"""Trains several candidates in one batched forward, each as it would be trained alone."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch

from autopeft.errors import MultiAdapterError, TrainingFailure
from autopeft.tasks.base import Task
from autopeft.tasks.batch import collate
from autopeft.tasks.data import TaskData
from autopeft.training.acceleration import NO_ACCELERATION, TOLERANCE, Acceleration
from autopeft.training.attention import training_attention
from autopeft.training.batching import IntArray
from autopeft.training.precision import Precision, autocast, rounded_once, synchronize
from autopeft.training.trainer import Trainer, train_adapters_only

MUST_SAVE = 0.9
"""A pack's step may take at most this share of the time of its candidates' steps."""


class LanePack(Protocol):
    """Candidates attached to one model together: `autopeft.models.multi_adapter.MultiAdapter`."""

    def placed(self) -> AbstractContextManager[torch.nn.Module]:
        """The model with all of them in it, side by side along the batch."""
        ...

    def alone(self, index: int) -> AbstractContextManager[torch.nn.Module]:
        """The model with one of them in it."""
        ...

    def keeping(self, indices: Sequence[int]) -> LanePack:
        """A pack of some of them, which keep their indices."""
        ...


class MultiTrainer:
    """The trainings of a pack, step by step together.

    Each keeps its own rows, optimizer, rates, clipping and failures.

    Args:
        lanes: Index in the pack -> its training, not begun, all with the same number of rows a
            batch.
        pack: The candidates.
        task: What the loss is.
        data: Train rows.
        device: Where the model is.
        precision: What to compute in.
        cache: Skips the frozen blocks below the lowest adapter of all.
        last_block: Skips positions of the last block that are not read.
        must_pay: Whether to measure, before the first step, if one step of the pack takes less time
            than a step of each.

    Attributes:
        failed: Lanes that are out, and why.
    """

    def __init__(
        self,
        lanes: Mapping[int, Trainer],
        pack: LanePack,
        task: Task,
        data: TaskData,
        *,
        device: str = "cpu",
        precision: Precision = "fp32",
        cache: Acceleration = NO_ACCELERATION,
        last_block: Acceleration = NO_ACCELERATION,
        must_pay: bool = False,
    ) -> None:
        self._lanes = dict(lanes)
        self._pack = pack
        self._task = task
        self._data = data
        self._device = device
        self._precision: Precision = precision
        self._cache = cache
        self._last_block = last_block
        self._is_checked = False
        self._must_pay = must_pay
        self.failed: dict[int, TrainingFailure] = {}

    def drop(self, index: int) -> None:
        """Leaves a lane behind; the others go on in a smaller batch."""
        del self._lanes[index]
        if self._lanes:
            self._pack = self._pack.keeping(list(self._lanes))

    def train_to(self, to_step: int) -> None:
        """Trains every lane up to a step; those that diverge are dropped, see `failed`.

        Raises:
            MultiAdapterError: if this model treats a pack otherwise than its candidates alone, or
                if a pack does not pay. None of them has made a step then.
        """
        trained = tuple(self._lanes.values())
        began, filled = time.perf_counter(), self._cache.setup_seconds
        try:
            with training_attention(self._precision, self._device):
                while self._lanes and min(lane.step for lane in self._lanes.values()) < to_step:
                    self._one_step()
            synchronize(self._device)
        finally:
            filling = self._cache.setup_seconds - filled
            seconds = time.perf_counter() - began - filling
            for lane in trained:
                lane.train_seconds += seconds / len(trained)
                lane.cache_seconds += filling / len(trained)

    def _one_step(self) -> None:
        rows = [lane.next_rows() for lane in self._lanes.values()]
        if not self._is_checked:
            self._check(rows)
        with self._pack.placed() as model:
            train_adapters_only(model)
            losses = self._losses(model, rows)
            each = [
                lane.with_penalty(loss)
                for lane, loss in zip(self._lanes.values(), losses, strict=True)
            ]
            # A lane's parameters take part in its own loss only, so that the gradients of the sum
            # are the gradients of each.
            torch.stack(each).sum().backward()  # type: ignore[no-untyped-call]
        for (index, lane), loss in zip(tuple(self._lanes.items()), each, strict=True):
            try:
                lane.update(loss.detach())
            except TrainingFailure as failure:
                self.failed[index] = failure
                self.drop(index)

    def _losses(self, model: torch.nn.Module, rows: Sequence[IntArray]) -> torch.Tensor:
        """Mean loss of each lane, shape (lanes,)."""
        batch = collate(self._data, "train", np.concatenate(rows), self._device)
        with (
            autocast(self._precision, self._device),
            self._cache.serving(batch),
            self._last_block.serving(batch),
            rounded_once(model, self._precision, self._device),
        ):
            return self._task.losses(model, batch, len(rows))

    def _check(self, rows: Sequence[IntArray]) -> None:
        """Compares the losses of the first step, and its time, with those of each lane alone."""
        self._is_checked = True
        # What is measured must have run before: the first pass finds kernels and fills caches.
        for _ in range(2 if self._must_pay else 1):
            alone, alone_seconds = self._trial_steps_alone(rows)
            with self._pack.placed() as model:
                packed, seconds = self._trial_step(model, rows)
        gap = float(((packed - alone).abs() / alone.abs().clamp(min=1e-3)).max())
        if not gap <= TOLERANCE[self._precision]:
            raise MultiAdapterError(f"losses of candidates together differ by {gap:.2g} from alone")
        if self._must_pay and seconds > MUST_SAVE * alone_seconds:
            ratio = alone_seconds / seconds
            raise MultiAdapterError(f"candidates together train {ratio:.2f} times as fast as alone")

    def _trial_steps_alone(self, rows: Sequence[IntArray]) -> tuple[torch.Tensor, float]:
        """Loss of each lane alone, shape (lanes,), and the seconds of all."""
        losses, seconds = [], 0.0
        for index, own in zip(self._lanes, rows, strict=True):
            with self._pack.alone(index) as model:
                loss, more = self._trial_step(model, [own])
            losses.append(loss[0])
            seconds += more
        return torch.stack(losses), seconds

    def _trial_step(
        self, model: torch.nn.Module, rows: Sequence[IntArray]
    ) -> tuple[torch.Tensor, float]:
        """Losses, shape (lanes,), and the seconds of a step that changes nothing."""
        train_adapters_only(model)
        synchronize(self._device)
        began = time.perf_counter()
        with torch.set_grad_enabled(self._must_pay):
            losses = self._losses(model, rows)
            if self._must_pay:
                losses.sum().backward()  # type: ignore[no-untyped-call]
        synchronize(self._device)
        seconds = time.perf_counter() - began
        model.zero_grad(set_to_none=True)
        return losses.detach(), seconds
