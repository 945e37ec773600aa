"""Trains several candidates in one batched forward pass, each as it would be trained alone."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from autopeft.errors import MultiAdapterError, TrainingFailure
from autopeft.models.multi_adapter import MultiAdapter
from autopeft.tasks.batch import collate
from autopeft.training.acceleration import TOLERANCE, verified
from autopeft.training.attention import training_attention
from autopeft.training.batching import IntArray
from autopeft.training.measuring import Metering
from autopeft.training.precision import rounded_once
from autopeft.training.setup import TrainingSetup
from autopeft.training.stopwatch import Stopwatch
from autopeft.training.trainer import Trainer, train_adapters_only
from autopeft.utils.device import synchronize

MAX_TIME_SHARE = 0.9
"""Training together must take at most this share of the time of training one after another."""


class MultiTrainer:
    """Advances the trainers of several candidates together, step by step.

    Each candidate keeps its own rows, optimizer, rates, clipping and failures.

    Args:
        trainers: Index -> trainer, none of them started, all with the same batch size and with
            their candidates parked.
        setup: How they are trained; its cache is below the lowest adapter of all.
        must_pay: Whether to measure, before the first step, if a step together takes less time than
            one step of each.

    Attributes:
        setup: As given; a cache below a higher adapter may replace it when the lowest one has left.
        failed: Why a candidate was dropped, by index: it diverged, or its time was up.
    """

    def __init__(
        self, trainers: Mapping[int, Trainer], setup: TrainingSetup, *, must_pay: bool = False
    ) -> None:
        self._trainers = dict(trainers)
        self.setup = setup
        self._candidates = self._adapters()
        self._is_checked = False
        self._must_pay = must_pay
        self.failed: dict[int, TrainingFailure] = {}

    def drop(self, index: int) -> None:
        """Stop training a candidate; the others continue in a smaller batch."""
        self._trainers.pop(index).release()
        if self._trainers:
            self._candidates = self._adapters()

    def _adapters(self) -> MultiAdapter:
        return MultiAdapter({i: trainer.attached for i, trainer in self._trainers.items()})

    def train_to(self, to_step: int) -> None:
        """Train every candidate up to a step; drop those that fail (`failed`).

        The seconds are shared by steps: one that leaves early pays for its own only.

        Raises:
            MultiAdapterError: if the model computes other losses than for each candidate alone, or
                if training together does not pay. No candidate has made a step then.
        """
        trained = tuple(self._trainers.values())
        before = [trainer.step for trainer in trained]
        watch = Stopwatch(self.setup.cache)
        metering = Metering(trained[0].meters if trained else {})
        for trainer in trained:
            trainer.clock.resume(trainer.step)
        try:
            with metering.running(), training_attention(self.setup.precision, self.setup.device):
                while any(trainer.step < to_step for trainer in self._trainers.values()):
                    self._one_step()
                synchronize(self.setup.device)
        finally:
            done = [trainer.step - step for trainer, step in zip(trained, before, strict=True)]
            seconds, cache_seconds = watch.seconds(), watch.cache_seconds()
            for trainer, n_steps in zip(trained, done, strict=True):
                # Without any step, an error or a slow check has taken the time of all.
                share = n_steps / sum(done) if any(done) else 1 / len(trained)
                trainer.train_seconds += seconds * share
                trainer.cache_seconds += cache_seconds * share
                of_steps = seconds / max(seconds + cache_seconds, 1e-9)
                trainer.add_metered(metering.risen, share * of_steps)

    def _one_step(self) -> None:
        rows = [trainer.next_rows() for trainer in self._trainers.values()]
        if not self._is_checked:
            self._check(rows)
        with self._candidates.placed() as model:
            train_adapters_only(model)
            losses = self._losses(model, rows)
            each = [
                trainer.with_penalty(loss)
                for trainer, loss in zip(self._trainers.values(), losses, strict=True)
            ]
            # Parameters of a candidate affect its own loss only, so the gradients of the sum are
            # the gradients of each loss.
            torch.stack(each).sum().backward()  # type: ignore[no-untyped-call]
        for (index, trainer), loss in zip(tuple(self._trainers.items()), each, strict=True):
            try:
                trainer.update(loss.detach())
            except TrainingFailure as failure:
                self.failed[index] = failure
                self.drop(index)

    def _losses(self, model: torch.nn.Module, rows: Sequence[IntArray]) -> torch.Tensor:
        """Return the mean loss on each candidate's rows, shape (len(rows),)."""
        setup = self.setup
        batch = collate(setup.data, "train", np.concatenate(rows), setup.device)
        with setup.forward(batch), rounded_once(model, setup.precision, setup.device):
            return setup.task.losses(model, batch, len(rows))

    def _check(self, rows: Sequence[IntArray]) -> None:
        """Compare the losses of the first step, and its time, with those of each alone."""
        self._is_checked = True
        # The first pass finds kernels and fills caches, so a pass to be timed is run twice.
        for _ in range(2 if self._must_pay else 1):
            losses, alone_seconds = [], 0.0
            for index, own in zip(self._trainers, rows, strict=True):
                with self._candidates.alone(index) as model:
                    loss, more = self._dry_step(model, [own])
                losses.append(loss[0])
                alone_seconds += more
            with self._candidates.placed() as model:
                together, seconds = self._dry_step(model, rows)
        alone = torch.stack(losses)
        scale = alone.abs().clamp(min=1e-3)  # Each loss is compared relative to itself.
        verified(
            together / scale,
            alone / scale,
            TOLERANCE[self.setup.precision],
            what="multi-adapter training",
            error=MultiAdapterError,
        )
        if self._must_pay and seconds > MAX_TIME_SHARE * alone_seconds:
            raise MultiAdapterError(
                f"candidates together train {alone_seconds / seconds:.2f} times as fast as alone"
            )

    def _dry_step(
        self, model: torch.nn.Module, rows: Sequence[IntArray]
    ) -> tuple[torch.Tensor, float]:
        """Return the losses, shape (len(rows),), and the seconds of a step without an update."""
        train_adapters_only(model)
        synchronize(self.setup.device)
        started = time.perf_counter()
        with torch.set_grad_enabled(self._must_pay):
            losses = self._losses(model, rows)
            if self._must_pay:
                losses.sum().backward()  # type: ignore[no-untyped-call]
        synchronize(self.setup.device)
        seconds = time.perf_counter() - started
        model.zero_grad(set_to_none=True)
        return losses.detach(), seconds
