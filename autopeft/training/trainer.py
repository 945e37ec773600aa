"""The proxy training of one candidate: rung by rung, on a model that has its adapters."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from autopeft.errors import TrainingFailure
from autopeft.plan import TrainSettings
from autopeft.tasks.base import Evaluation, Task
from autopeft.tasks.batch import collate
from autopeft.tasks.data import SplitName, TaskData
from autopeft.training.attention import training_attention
from autopeft.training.batching import IntArray, rung_sample, training_batches
from autopeft.training.cache_protocol import NO_PREFIX, Prefix
from autopeft.training.evaluation import evaluate
from autopeft.training.last_block import READ_ALL, Readout
from autopeft.training.modes import train_adapters_only
from autopeft.training.precision import Precision, autocast, choose_precision, synchronize
from autopeft.training.rounded_weights import rounded_once
from autopeft.training.rungs import rung_steps
from autopeft.trial import RungReport

__all__ = ["AttachedModel", "ParameterGroup", "ProxyTraining", "rate_factor", "rung_steps"]

MAX_GRADIENT_NORM = 1.0
CHECK_EVERY = {"cpu": 1, "cuda": 16}
"""Steps between looks at the loss: on an accelerator a look waits for all the work queued."""


class ParameterGroup(Protocol):
    """Parameters that share a learning rate."""

    @property
    def method(self) -> str:
        """Whose parameters these are; "head" for a new classification head."""

    @property
    def learning_rate(self) -> float:
        """Peak rate."""

    @property
    def parameters(self) -> Sequence[torch.nn.Parameter]:
        """The parameters themselves."""


class AttachedModel(Protocol):
    """A model with its adapters, as `autopeft.models.attach` gives it."""

    @property
    def model(self) -> torch.nn.Module:
        """Takes a batch's inputs, gives logits."""

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Everything that is trained; empty where there is nothing to train."""

    def penalty(self) -> torch.Tensor | None:
        """What its methods add to a training loss; None: nothing."""

    def after_update(self, step: int) -> None:
        """Lets its methods act after an optimizer step, while the gradients are still there."""


class ProxyTraining:
    """Trains one candidate; the same seed gives the same data order and the same result.

    Dropout acts inside adapters only, never in the frozen base (see `train_adapters_only`).

    Args:
        attached: The model with its adapters.
        task: What the loss is.
        data: Train and validation rows.
        train: Rates, steps, batch size.
        seed: Seeds the data order and the adapters' dropout.
        device: Where the model is: "cpu", "cuda"...
        precision: "auto", "fp32" or "bf16".
        flops_per_step: As priced; reports multiply it by their step.
        prefix: Stands in for the frozen lower blocks.
        readout: Leaves out what nobody reads of the last block.
        rung_rows: Validation rows to look at before the last step, the same ones in every
            training: on a CPU a thousand rows cost as much as thirty steps. None: all.

    Attributes:
        step: Optimizer steps done.
        train_seconds: Spent in training steps.
        evaluation_seconds: Spent in evaluations.
        prefix_seconds: Spent on filling the cache of the frozen prefix; part of neither of the
            others, since it serves later trainings as well.
        precision: What it computes in, with the measurement behind it.
    """

    def __init__(
        self,
        attached: AttachedModel,
        task: Task,
        data: TaskData,
        train: TrainSettings,
        *,
        seed: int,
        device: str = "cpu",
        precision: str = "auto",
        flops_per_step: float = 0.0,
        prefix: Prefix = NO_PREFIX,
        readout: Readout = READ_ALL,
        rung_rows: int | None = None,
    ) -> None:
        self._attached = attached
        self._model = attached.model
        self._task = task
        self._data = data
        self._train = train
        self._device = device
        self._flops_per_step = flops_per_step
        self._prefix = prefix
        self._readout = readout
        self._rung_rows = rung_sample(len(data.validation), rung_rows)
        self.precision = choose_precision(precision, device, attached.model)
        self.step = 0
        self.train_seconds = 0.0
        self.evaluation_seconds = 0.0
        self.prefix_seconds = 0.0
        self._groups = [g for g in attached.parameter_groups() if len(g.parameters)]
        self._parameters = [p for group in self._groups for p in group.parameters]
        self._optimizer = _optimizer(self._groups, train.weight_decay)
        self._batches = training_batches(data.train.lengths, train.batch_size, seed)
        self._random = _RandomState(seed, device)
        self._unchecked: list[torch.Tensor] = []

    def advance(self, to_step: int) -> RungReport:
        """Trains up to a step and evaluates on the validation split, or on `rung_rows` of it.

        Args:
            to_step: Step to reach, counted from the start; at most `train.steps`.

        Raises:
            TrainingFailure: if the loss is no longer finite.
        """
        self.train_to(to_step)
        is_end = self.step >= self._train.steps
        evaluation = self.evaluate("validation", rows=None if is_end else self._rung_rows)
        if not math.isfinite(evaluation.loss):
            raise self._diverged(self.step)
        is_maximized = self._task.quality.direction == "maximize"
        return RungReport(
            step=self.step,
            score=-evaluation.loss if is_maximized else evaluation.loss,
            loss=evaluation.loss,
            metrics=evaluation.metrics,
            seconds=self.train_seconds,
            evaluation_seconds=self.evaluation_seconds,
            flops=self.step * self._flops_per_step,
        )

    def run(
        self, rungs: Iterable[int], on_rung: Callable[[RungReport], bool] = lambda _report: True
    ) -> tuple[RungReport, ...]:
        """Trains from rung to rung until `on_rung` says stop.

        Args:
            rungs: Increasing steps to report at.
            on_rung: Told each report; False ends the training.
        """
        reports = []
        for to_step in rungs:
            reports.append(self.advance(to_step))
            if not on_rung(reports[-1]):
                break
        return tuple(reports)

    def train_to(self, to_step: int) -> None:
        """Trains up to a step, without evaluating.

        Raises:
            TrainingFailure: if the loss is no longer finite.
        """
        to_step = min(to_step, self._train.steps)
        watch = _Watch(self._prefix)
        train_adapters_only(self._model)
        try:
            with (
                self._random.resumed(),
                training_attention(self.precision.precision, self._device),
                rounded_once(self._model, self.precision.precision, self._device),
            ):
                while self.step < to_step:
                    self._one_step()
            self._check_losses()
            synchronize(self._device)
        finally:
            self.train_seconds += watch.seconds()
            self.prefix_seconds += watch.filling()

    def evaluate(
        self,
        split: SplitName,
        *,
        precision: Precision | None = None,
        rows: IntArray | None = None,
    ) -> Evaluation:
        """Scores a split with the adapters as they are now.

        Args:
            split: "validation" or "test" (or "train").
            precision: Instead of the training's own. A cached prefix computed in the training's
                precision is then left aside.
            rows: Positions in the split to score; None: all.
        """
        watch = _Watch(self._prefix)
        is_own = precision is None or precision == self.precision.precision
        evaluation = evaluate(
            self._model,
            self._task,
            self._data,
            split,
            rows=rows,
            device=self._device,
            precision=precision or self.precision.precision,
            prefix=self._prefix if is_own else NO_PREFIX,
            readout=self._readout,
        )
        self.evaluation_seconds += watch.seconds()
        self.prefix_seconds += watch.filling()
        return evaluation

    def _one_step(self) -> None:
        batch = collate(self._data, "train", self.next_rows(), self._device)
        if not self._parameters:
            self.step += 1
            return
        with (
            autocast(self.precision.precision, self._device),
            self._prefix.serving(batch),
            self._readout.serving(batch),
        ):
            loss = self._task.loss(self._model, batch)
        loss = self.with_penalty(loss)
        loss.backward()  # type: ignore[no-untyped-call]
        self.learn(loss.detach())

    def next_rows(self) -> IntArray:
        """The rows of the next step, shape (batch_size,); each call goes one step on."""
        return next(self._batches)

    def with_penalty(self, loss: torch.Tensor) -> torch.Tensor:
        """A step's loss, and what the methods add to it."""
        penalty = self._attached.penalty()
        return loss if penalty is None else loss + penalty

    def learn(self, loss: torch.Tensor) -> None:
        """Ends a step, once its gradients are there.

        Args:
            loss: What they are the gradients of, detached.

        Raises:
            TrainingFailure: if a loss is no longer finite (on an accelerator, some steps later).
        """
        torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRADIENT_NORM, foreach=True)
        self._set_rates()
        self._optimizer.step()
        self._attached.after_update(self.step + 1)
        self._optimizer.zero_grad(set_to_none=True)
        self._unchecked.append(loss)
        self.step += 1
        if len(self._unchecked) >= CHECK_EVERY.get(torch.device(self._device).type, 1):
            self._check_losses()

    def _set_rates(self) -> None:
        factor = rate_factor(self.step, self._train.steps, self._train.warmup_fraction)
        for options in self._optimizer.param_groups:
            options["lr"] = options["peak"] * factor

    def _check_losses(self) -> None:
        if not self._unchecked:
            return
        is_finite = torch.isfinite(torch.stack(self._unchecked)).tolist()
        first_step = self.step - len(self._unchecked) + 1
        self._unchecked.clear()
        if not all(is_finite):
            raise self._diverged(first_step + is_finite.index(False))

    def _diverged(self, step: int) -> TrainingFailure:
        rates = ", ".join(f"{g.method} {g.learning_rate:g}" for g in self._groups)
        return TrainingFailure(
            f"the loss was not finite at step {step} of {self._train.steps} "
            f"(learning rate {rates or 'none'}); a lower rate may train"
        )


def rate_factor(step: int, steps: int, warmup_fraction: float) -> float:
    """Share of the peak rate at a step: linear up to 1, then linear down, never 0.

    Args:
        step: Steps done before this one.
        steps: Steps in all.
        warmup_fraction: Share of the steps spent rising.
    """
    n_warmup = min(steps, math.ceil(steps * warmup_fraction))
    if step < n_warmup:
        return (step + 1) / n_warmup
    return (steps - step) / max(1, steps - n_warmup)


def _optimizer(groups: Sequence[ParameterGroup], weight_decay: float) -> torch.optim.Optimizer:
    if not groups:
        return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
    options: list[dict[str, Any]] = [
        {"params": list(g.parameters), "lr": g.learning_rate, "peak": g.learning_rate}
        for g in groups
    ]
    return torch.optim.AdamW(options, weight_decay=weight_decay, fused=True)


class _Watch:
    """Tells the seconds since it was made, those spent on filling a cache apart."""

    def __init__(self, prefix: Prefix) -> None:
        self._prefix = prefix
        self._filled_before = prefix.fill_seconds
        self._started = time.perf_counter()

    def filling(self) -> float:
        """Seconds spent on filling."""
        return self._prefix.fill_seconds - self._filled_before

    def seconds(self) -> float:
        """All other seconds."""
        return time.perf_counter() - self._started - self.filling()


class _RandomState:
    """A random stream of its own, so that nothing else done in the process disturbs a training."""

    def __init__(self, seed: int, device: str) -> None:
        is_cuda = torch.device(device).type == "cuda"
        self._devices = [torch.device(device)] if is_cuda else []
        with torch.random.fork_rng(self._devices):
            torch.manual_seed(seed)
            self._save()

    def _save(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(d) for d in self._devices]

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """Goes on from where this stream was, and leaves the process's own as it was."""
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._cpu)
            for device, state in zip(self._devices, self._cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
            self._save()
