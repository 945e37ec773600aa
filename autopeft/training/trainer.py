"""Trains one candidate up to its rungs, on a model that has its adapters attached."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from autopeft.errors import TrainingFailure
from autopeft.models.attach import Attached
from autopeft.plan import TrainSettings
from autopeft.tasks.base import Evaluation
from autopeft.tasks.batch import Batch, collate
from autopeft.tasks.data import SplitName
from autopeft.training.acceleration import NO_ACCELERATION
from autopeft.training.attention import training_attention
from autopeft.training.batching import IntArray, micro_batches, rung_sample, training_batches
from autopeft.training.checkpointing import recomputed
from autopeft.training.compilation import CompiledSteps
from autopeft.training.evaluation import evaluate
from autopeft.training.loss_watch import LossWatch
from autopeft.training.measuring import Meter, Metering
from autopeft.training.optimizers import make_optimizer
from autopeft.training.precision import Precision, rounded_once
from autopeft.training.setup import TrainingSetup
from autopeft.training.step_clock import StepClock
from autopeft.training.stopwatch import Stopwatch
from autopeft.trial import RungReport
from autopeft.utils.device import RandomState, empty_cache, kind_of, synchronize

MAX_GRADIENT_NORM = 1.0

CHECK_EVERY = {"cpu": 1, "accelerator": 16}
"""Steps between checks of the loss. On an accelerator a check waits for all queued work."""

_SPARE = 0.1
"""A scoring after the last step may go on past the deadline by this share of the training's time:
an hour's training is not thrown away for the last minutes."""


class Trainer:
    """Trains one candidate. The same seed gives the same data order and the same result.

    Dropout is active inside adapters only, never in the frozen base (`train_adapters_only`).

    Args:
        attached: The model with its adapters.
        setup: What is trained on, and how.
        train: Rates, steps, batch size.
        seed: Seeds the data order and the adapters' dropout.
        flops_per_step: Priced FLOPs of a step; reports multiply them by their step.
        rung_rows: Validation rows scored before the last step, the same ones in every training:
            on a CPU, scoring a thousand rows costs as much as thirty steps. None: all.
        clock: Ends the training at its deadline, with an `OutOfTime`, and tells how far it is.
        ends_early: Whether a loss far above its start ends the training.
        meters: Counters that are read around its steps, by the name of the cost.

    Attributes:
        step: Optimizer steps done.
        train_seconds: Seconds spent on training steps.
        evaluation_seconds: Seconds spent on evaluations.
        compile_seconds: Seconds spent on compiling blocks, comparing and measuring them. Not part
            of `train_seconds`: whether a trial pays for them depends on the trials before.
        cache_seconds: Seconds spent on filling the activation cache. Not part of the others,
            because later trainings reuse what is cached.
        metered: By how much each of the meters rose while steps were made, of the share of that
            time that is in `train_seconds`.
        is_halved: Whether a step did not fit into the device's memory: since then, micro-batches
            are half as large. Once is enough; then the training fails.
    """

    def __init__(
        self,
        attached: Attached,
        setup: TrainingSetup,
        train: TrainSettings,
        *,
        seed: int,
        flops_per_step: float = 0.0,
        rung_rows: int | None = None,
        clock: StepClock | None = None,
        ends_early: bool = True,
        meters: Mapping[str, Meter] | None = None,
    ) -> None:
        self.attached = attached
        self.setup = setup
        self.clock = clock or StepClock()
        self._model = attached.model
        self._train = train
        self._flops_per_step = flops_per_step
        self._rung_rows = rung_sample(len(setup.data.validation), rung_rows)
        self.step = 0
        self.train_seconds = 0.0
        self.evaluation_seconds = 0.0
        self.cache_seconds = 0.0
        self.meters = dict(meters or {})
        self.metered = dict.fromkeys(self.meters, 0.0)
        self.is_halved = False
        self._next_stop = train.steps
        self._groups = [g for g in attached.parameter_groups() if len(g.parameters)]
        self._parameters = [p for group in self._groups for p in group.parameters]
        self._steps = self._compiled_steps()
        self._optimizer = make_optimizer(setup.optimizer, self._groups, train.weight_decay)
        self._batches = training_batches(setup.data.train.lengths, train.batch_size, seed)
        self._random = RandomState(seed, setup.device)
        self._unchecked: list[torch.Tensor] = []
        self._losses = LossWatch()
        self._ends_early = ends_early
        self._first_rows: IntArray | None = None

    def _compiled_steps(self) -> CompiledSteps | None:
        setup = self.setup
        if setup.compiler is None or not setup.compiled:
            return None
        return CompiledSteps(
            setup.compiler,
            self._model,
            setup.compiled,
            self._parameters,
            clock=self.clock,
            cache=setup.cache,
            precision=setup.precision,
            device=setup.device,
        )

    @property
    def compile_seconds(self) -> float:
        """See the class."""
        return 0.0 if self._steps is None else self._steps.seconds

    def advance(self, to_step: int) -> RungReport:
        """Train up to a step, counted from the start; score the validation split or `rung_rows`.

        Raises:
            TrainingFailure: if the loss is no longer finite, or far above its start.
            OutOfTime: if the deadline has passed.
        """
        self.train_to(to_step)
        is_end = self.step >= self._train.steps
        rows = None if is_end else self._rung_rows
        evaluation = self.evaluate("validation", rows=rows, with_text=is_end)
        if not math.isfinite(evaluation.loss):
            raise self._diverged(self.step)
        is_maximized = self.setup.task.quality.direction == "maximize"
        return RungReport(
            step=self.step,
            score=-evaluation.loss if is_maximized else evaluation.loss,
            loss=evaluation.loss,
            metrics=evaluation.metrics,
            seconds=self.train_seconds,
            evaluation_seconds=self.evaluation_seconds,
            flops=self.flops,
        )

    @property
    def flops(self) -> float:
        """Priced FLOPs of the steps done."""
        return self.step * self._flops_per_step

    def train_to(self, to_step: int) -> None:
        """Train up to a step without evaluating; raises as `advance` does."""
        to_step = min(to_step, self._train.steps)
        watch, compile_seconds = Stopwatch(self.setup.cache), self.compile_seconds
        metering = Metering(self.meters if self.step < to_step else {})
        self._next_stop = to_step
        self.clock.resume(self.step)
        train_adapters_only(self._model)
        try:
            with (
                metering.running(),
                self._random.resumed(),
                training_attention(self.setup.precision, self.setup.device),
                rounded_once(self._model, self.setup.precision, self.setup.device),
            ):
                while self.step < to_step:
                    self._one_step()
                self._check_losses()
                synchronize(self.setup.device)
        finally:
            seconds, cache_seconds = watch.seconds(), watch.cache_seconds()
            own = seconds - (self.compile_seconds - compile_seconds)
            self.train_seconds += own
            self.cache_seconds += cache_seconds
            self.add_metered(metering.risen, own / max(seconds + cache_seconds, 1e-9))

    def add_metered(self, risen: Mapping[str, float], share: float) -> None:
        """Add a share of what meters told while steps were made, as of their time."""
        for name, value in risen.items():
            self.metered[name] = self.metered.get(name, 0.0) + share * value

    def evaluate(
        self,
        split: SplitName,
        *,
        precision: Precision | None = None,
        rows: IntArray | None = None,
        with_text: bool = True,
        n_draws: int = 0,
    ) -> Evaluation:
        """Score a split with the adapters as they are now.

        Args:
            split: "validation" or "test" (or "train").
            precision: Replaces the training's precision.
            rows: Positions in the split to score; None: all.
            with_text: Whether text is generated, if a metric of the task needs it.
            n_draws: Resamples of the rows, for a quality that is no mean over them.
        """
        setup = self.setup
        if precision is not None and precision != setup.precision:
            # The cache holds what the training's precision computes.
            cache = setup.fp32_cache if precision == "fp32" else NO_ACCELERATION
            setup = replace(setup, precision=precision, cache=cache)
        return self.score(setup, split, rows=rows, with_text=with_text, n_draws=n_draws)

    def score(
        self,
        setup: TrainingSetup,
        split: SplitName,
        *,
        rows: IntArray | None = None,
        with_text: bool = True,
        n_draws: int = 0,
    ) -> Evaluation:
        """Score a split of another setup, as `evaluate` does; its time is booked likewise."""
        watch = Stopwatch(setup.cache)
        is_trained = self.step >= self._train.steps
        spare = _SPARE * self.train_seconds if is_trained else 0.0
        try:
            with self.clock.watching(self._model, step=self.step, spare=spare):
                return evaluate(
                    self._model, setup, split, rows=rows, with_text=with_text, n_draws=n_draws
                )
        finally:
            self.evaluation_seconds += watch.seconds()
            self.cache_seconds += watch.cache_seconds()

    def _one_step(self) -> None:
        rows = self.next_rows()
        if not self._parameters:
            self.step += 1
            return
        if not self.is_halved:
            parts = self._micro_batches(rows)
            try:
                return self.update(self._backward(parts))
            except torch.OutOfMemoryError:
                if len(parts) == len(rows) or not self.setup.task.can_share_batch:
                    raise
                self.is_halved = True
            # Out here nothing holds the failed pass's tensors any more.
            self._model.zero_grad(set_to_none=True)
            self.setup.cache.leave_device()
            empty_cache(self.setup.device)
        self.update(self._backward(self._micro_batches(rows)))

    def _micro_batches(self, rows: IntArray) -> list[IntArray]:
        """Split the rows of a step into those of each forward pass."""
        setup, parts = self.setup, [rows]
        if setup.micro_batch_tokens is not None:
            lengths = setup.data.train.lengths[rows]
            parts = [rows[places] for places in micro_batches(lengths, setup.micro_batch_tokens)]
        if self.is_halved:
            parts = [half for part in parts for half in np.array_split(part, min(2, len(part)))]
        return parts

    def _backward(self, parts: Sequence[IntArray]) -> torch.Tensor:
        """Compute the gradients of a step from its micro-batches; return its loss."""
        if self._steps is None:
            return self._gradients(parts)
        return self._steps.run(partial(self._gradients, parts), self._next_stop - self.step)

    def _gradients(self, parts: Sequence[IntArray]) -> torch.Tensor:
        return self._backward_at_once(parts[0]) if len(parts) == 1 else self._accumulated(parts)

    def _backward_at_once(self, rows: IntArray) -> torch.Tensor:
        setup = self.setup
        batch = self._batch(rows)
        with self._forward(batch):
            loss = self.with_penalty(setup.task.loss(self._model, batch))
            self._backward_of(loss)
        return loss.detach()

    @contextmanager
    def _forward(self, batch: Batch) -> Iterator[None]:
        """Compute a step's passes, forward and back, on this batch."""
        compiled = nullcontext() if self._steps is None else self._steps.compiled()
        with (
            self.setup.forward(batch),
            compiled,
            # The outer one: what it computes again is compiled.
            recomputed(self._model, self.setup.recomputed),
        ):
            yield

    def _backward_of(self, loss: torch.Tensor) -> None:
        """Compute gradients. Blocks that are computed again need what served the forward pass."""
        with torch.autocast(torch.device(self.setup.device).type, enabled=False):
            loss.backward()  # type: ignore[no-untyped-call]

    def _batch(self, rows: IntArray) -> Batch:
        setup = self.setup
        if setup.packing is not None:
            return setup.packing.batch(self._model, rows)
        return collate(setup.data, "train", rows, setup.device)

    def _accumulated(self, parts: Sequence[IntArray]) -> torch.Tensor:
        """Compute the same gradients from some of the rows at a time, in less memory.

        A mean over the micro-batches' means would give tokens of short rows another weight.
        """
        setup = self.setup
        total = n_terms = torch.zeros((), device=setup.device)
        for rows in parts:
            batch = self._batch(rows)
            with self._forward(batch):
                losses, weights = setup.task.row_losses(self._model, batch)
                loss = losses.sum()
                self._backward_of(loss)
            total = total + loss.detach()
            n_terms = n_terms + weights.sum()
        n_terms = n_terms.clamp(min=1.0)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        # A model may be spread over several devices.
        for device in {gradient.device for gradient in gradients}:
            there = [gradient for gradient in gradients if gradient.device == device]
            torch._foreach_div_(there, n_terms.to(device))
        loss = total / n_terms
        if (penalty := self.attached.penalty()) is not None:
            penalty.backward()  # type: ignore[no-untyped-call]
            loss = loss + penalty.detach()
        return loss

    def next_rows(self) -> IntArray:
        """Return the rows of the next step, shape (batch_size,)."""
        if self._losses.wants_first and not self._unchecked and self._first_rows is not None:
            return self._first_rows
        rows = next(self._batches)
        if self._first_rows is None:
            self._first_rows = rows
        return rows

    def with_penalty(self, loss: torch.Tensor) -> torch.Tensor:
        """Return a step's loss plus what the methods add to it."""
        penalty = self.attached.penalty()
        return loss if penalty is None else loss + penalty

    def update(self, loss: torch.Tensor) -> None:
        """Finish a step whose gradients have been computed, given its detached loss.

        Raises:
            TrainingFailure: if the training diverges (on an accelerator, some steps later).
            OutOfTime: if the deadline has passed.
        """
        torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRADIENT_NORM, foreach=True)
        factor = rate_factor(self.step, self._train.steps, self._train.warmup_fraction)
        for options in self._optimizer.param_groups:
            options["lr"] = options["peak"] * factor
        self._optimizer.step()
        self.attached.after_update(self.step + 1)
        self._optimizer.zero_grad(set_to_none=True)
        self._unchecked.append(loss)
        self.step += 1
        if len(self._unchecked) >= CHECK_EVERY[kind_of(self.setup.device)]:
            self._check_losses()
        self.clock.after_step(self.step, loss, is_last=self.step >= self._train.steps)

    def release(self) -> None:
        """Free the gradients and the optimizer's state. No step may follow."""
        self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.state.clear()

    def _check_losses(self) -> None:
        if not self._unchecked:
            return
        losses = torch.stack(self._unchecked).tolist()
        first_step = self.step - len(self._unchecked) + 1
        self._unchecked.clear()
        is_finite = [math.isfinite(loss) for loss in losses]
        if not all(is_finite):
            raise self._diverged(first_step + is_finite.index(False))
        if self._ends_early and (rise := self._losses.add(losses)) is not None:
            raise self._diverged(self.step, "rose from {:.3g} to {:.3g}".format(*rise))

    def _diverged(self, step: int, what: str = "was not finite") -> TrainingFailure:
        rates = ", ".join(f"{g.method} {g.learning_rate:g}" for g in self._groups)
        return TrainingFailure(
            f"the loss {what} at step {step} of {self._train.steps} "
            f"(learning rate {rates or 'none'}); a lower rate may train"
        )


def rate_factor(step: int, steps: int, warmup_fraction: float) -> float:
    """Return the share of the peak rate at a step: linear up to 1, then linear down, never 0."""
    n_warmup = min(steps, math.ceil(steps * warmup_fraction))
    if step < n_warmup:
        return (step + 1) / n_warmup
    return (steps - step) / max(1, steps - n_warmup)


def train_adapters_only(model: torch.nn.Module) -> None:
    """Switch dropout on inside adapters and off everywhere else.

    The base is frozen, so its dropout would only add noise to what the adapters see. Without it
    the hidden states below the lowest adapter are the same in every epoch, in training and in
    evaluation, and can be cached (`autopeft.training.activation_cache`).

    An adapter is a module that wraps another one as `base_layer`, or one that has an attribute
    `is_autopeft_adapter`.
    """
    model.eval()
    for module in model.modules():
        if hasattr(module, "base_layer"):
            # The wrapper's own flag matters: DoRA checks it to decide what to drop.
            module.training = True
            for name, child in module.named_children():
                if name != "base_layer":
                    child.train()
        elif getattr(module, "is_autopeft_adapter", False):
            module.train()
