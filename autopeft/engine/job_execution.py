"""One job in progress on a worker: attach, train to rungs, confirm, save."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from autopeft.confirm.finalists import Compressed, SeedScore
from autopeft.costs import Price
from autopeft.engine.messages import Activity, ConfirmMessage, FailureMessage, Job, RungMessage
from autopeft.errors import TrainingFailure
from autopeft.models.attach import Attached, attach
from autopeft.models.lora_conversion import TrainedLora
from autopeft.models.saving import save_adapter
from autopeft.plan import Candidate
from autopeft.tasks.data import OutputScale
from autopeft.training.acceleration import NO_ACCELERATION
from autopeft.training.latency import measure_latency_ms
from autopeft.training.trainer import Trainer

if TYPE_CHECKING:
    from autopeft.engine.executor import Executor

JOB_ERRORS = (TrainingFailure, RuntimeError, ValueError)
"""Out of memory, a diverged loss, a module that rejects its adapter: the job fails, and the worker
with its loaded model lives on."""


class JobExecution:
    """One job in progress on an executor's model."""

    def __init__(self, executor: Executor, job: Job) -> None:
        self._executor = executor
        self.job = job
        self._attached: Attached | None = None
        self._training: Trainer | None = None
        self._next_rung = 0
        self._attach_seconds = 0.0
        self._validation_seconds = 0.0
        self._compress_seconds = 0.0
        self._reported = Activity()

    def start(self) -> tuple[Attached, Trainer]:
        """Attach the candidate on the first call; return it and its training."""
        if self._attached is None or self._training is None:
            job, started = self.job, time.perf_counter()
            self._attached = attach(self._executor.backbone, job.candidate, seed=job.seed)
            self._training = self._training_of(self._attached, job.candidate, job.costs)
            self._attach_seconds += time.perf_counter() - started
        return self._attached, self._training

    def _training_of(self, attached: Attached, candidate: Candidate, costs: Price) -> Trainer:
        executor, cache = self._executor, self._executor.activation_cache
        return Trainer(
            attached,
            executor.task,
            executor.context.data,
            candidate.train,
            seed=self.job.seed,
            device=executor.context.device,
            precision=executor.precision,
            flops_per_step=costs.train_flops / candidate.train.steps,
            cache=NO_ACCELERATION if cache is None else cache.below(candidate.plan.lowest_layer),
            last_block=executor.last_block,
            rung_rows=executor.context.settings.rung_rows,
        )

    def failure(self, error: Exception) -> FailureMessage:
        """Return the message that says why the job failed, in one line."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return FailureMessage(reason[:500], self._new_activity())

    def _new_activity(self) -> Activity:
        """Return the seconds spent since the last message."""
        training = self._training
        total = Activity(
            train=training.train_seconds if training else 0.0,
            evaluate=(training.evaluation_seconds if training else 0.0) + self._compress_seconds,
            attach=self._attach_seconds,
            cache=training.cache_seconds if training else 0.0,
        )
        new, self._reported = total - self._reported, total
        return new

    def advance(self) -> RungMessage | ConfirmMessage:
        """Train to the next rung, or to the end for a confirmation; may raise `JOB_ERRORS`."""
        attached, training = self.start()
        if self.job.kind == "confirm":
            return self._confirm(attached, training)
        rungs = self._executor.context.rungs
        before = training.evaluation_seconds
        report = training.advance(rungs[self._next_rung])
        self._validation_seconds = training.evaluation_seconds - before
        self._next_rung += 1
        is_last = self._next_rung == len(rungs)
        measured = self._measure(attached, training) if is_last else {}
        return RungMessage(report, is_last, measured, self._new_activity())

    def _measure(self, attached: Attached, training: Trainer) -> dict[str, float]:
        context = self._executor.context
        measured = {
            "train_seconds": training.train_seconds,
            "validation_seconds": self._validation_seconds,
        }
        if "latency_ms" in context.objectives:
            measured["latency_ms"] = measure_latency_ms(
                attached.model, context.data, device=context.device
            )
        return measured

    def _confirm(self, attached: Attached, training: Trainer) -> ConfirmMessage:
        job = self.job
        training.train_to(job.candidate.train.steps)
        score = self._score(attached, training, job.costs)
        files = self._files(attached)
        compressed = tuple(self._compress(attached)) if job.lower_ranks else ()
        return ConfirmMessage(score, files, self._new_activity(), job.costs.train_flops, compressed)

    def _score(self, attached: Attached, training: Trainer, costs: Price) -> SeedScore:
        names = self._executor.context.objectives
        validation = training.evaluate("validation")
        # In full precision, as users who load the adapter will run it.
        test = training.evaluate("test", precision="fp32")
        measured = self._measure(attached, training)
        objectives = {names[0]: test.metrics[names[0]]}
        for name in names[1:]:
            objectives[name] = float(measured[name] if name in measured else costs.value(name))
        return SeedScore(
            seed=self.job.seed,
            validation={**validation.metrics, "loss": validation.loss},
            test={**test.metrics, "loss": test.loss},
            test_rows=tuple(map(float, test.rows)),
            test_draws=tuple(map(float, test.draws)) if test.draws is not None else (),
            objectives=objectives,
        )

    def _files(self, attached: Attached) -> dict[str, bytes]:
        context = self._executor.context
        started = time.perf_counter()
        scale = context.data.output_scale or OutputScale()
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(
                attached,
                Path(folder),
                base_model=context.settings.model,
                revision=context.settings.model_revision,
                extra={
                    "task": self._executor.task.name,
                    "labels": list(context.data.labels),
                    "seed": self.job.seed,
                },
                shift=scale.shift,
                factor=scale.factor,
            )
            files = {
                str(path.relative_to(folder)): path.read_bytes()
                for path in sorted(Path(folder).rglob("*"))
                if path.is_file()
            }
        self._attach_seconds += time.perf_counter() - started
        return files

    def _compress(self, attached: Attached) -> Iterator[Compressed]:
        """Yield the trained LoRA at lower ranks; the last of them stays attached."""
        trained = TrainedLora(attached)
        train_seconds = self._training.train_seconds if self._training else 0.0
        paid = self.job.costs
        for candidate, own in self.job.lower_ranks:
            started = time.perf_counter()
            if self._attached is not None:
                self._attached.detach()
            cut = self._attached = attach(self._executor.backbone, candidate, seed=self.job.seed)
            trained.cut_into(cut)
            self._attach_seconds += time.perf_counter() - started
            scoring = self._training_of(cut, candidate, own)
            # Producing it cost the training that it was cut from.
            scoring.train_seconds = train_seconds
            costs = replace(
                own, train_flops=paid.train_flops, peak_memory_bytes=paid.peak_memory_bytes
            )
            score = self._score(cut, scoring, costs)
            self._compress_seconds += scoring.evaluation_seconds
            yield Compressed(candidate, costs, score, self._files(cut))

    def park(self) -> None:
        """Take the candidate out of the model until `unpark`."""
        if self._attached is not None:
            self._attached.park()

    def unpark(self) -> None:
        """Put the candidate back into the model."""
        if self._attached is not None:
            self._attached.unpark()

    def close(self) -> None:
        """Detach the candidate; the base model is as it was before."""
        self._training = None
        if self._attached is not None:
            self._attached.detach()
            self._attached = None
