"""One worker's bench: the base model stays loaded, jobs come and go. Knows no ray."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from autopeft.confirm.finalists import Compressed, SeedScore
from autopeft.costs import Price, PriceTable
from autopeft.engine.messages import (
    Activity,
    ConfirmMessage,
    FailureMessage,
    Job,
    Message,
    RungMessage,
)
from autopeft.errors import TrainingFailure
from autopeft.models.attach import Attached, attach
from autopeft.models.backbone import Backbone, load_backbone
from autopeft.models.lora_conversion import TrainedLora
from autopeft.models.saving import save_adapter
from autopeft.plan import Candidate
from autopeft.profiling.output_positions import narrow_modules
from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.tasks.data import TaskData
from autopeft.tasks.registry import make_task
from autopeft.training.acceleration import NO_ACCELERATION, Acceleration
from autopeft.training.activation_cache import ActivationCache
from autopeft.training.last_block import LastBlock
from autopeft.training.latency import measure_latency_ms
from autopeft.training.precision import choose_precision
from autopeft.training.trainer import Trainer

JOB_ERRORS = (TrainingFailure, RuntimeError, ValueError)
"""Out of memory, a diverged loss, a module that refuses its adapter: the job has failed, and saying
so keeps the loaded worker alive for the next one."""


@dataclass(frozen=True)
class WorkerContext:
    """All a worker needs to know, sent to it once.

    Attributes:
        settings: As resolved.
        data: Encoded splits; flat arrays, shared between the workers of a machine.
        prices: The model's price table.
        rungs: Steps at which a search job reports, the last one its end.
        objectives: Names of the objectives, the quality first.
        device: "cpu" or "cuda".
        window: Which of the task's windows the model's head reads; None: all positions, or unknown.
        cache_folder: Where the workers of one machine share the activation cache; removed by the
            driver. None: each worker keeps its own in memory.
    """

    settings: SearchSettings
    data: TaskData
    prices: PriceTable
    rungs: tuple[int, ...]
    objectives: tuple[str, ...]
    device: str
    window: str | None = None
    cache_folder: str | None = None


class Workbench:
    """Loads the base model once, then runs one job after another on it.

    Args:
        context: What the worker needs to know.

    Attributes:
        task: How rows are scored.
        backbone: The base model.
        precision: What trainings compute in.
        activation_cache: The frozen blocks' states, None if they are not cached.
        last_block: Skips positions of the last block that are not read.
        load_seconds: What loading took.
        packs: False once a pack has failed or has not paid (`autopeft.engine.job_groups`).
        has_measured_packs: Whether a pack has been compared with its jobs alone.
    """

    def __init__(self, context: WorkerContext) -> None:
        started = time.perf_counter()
        self.context = context
        self.task: Task = make_task(context.settings, context.data)
        self.backbone: Backbone = load_backbone(
            context.settings.model,
            auto_class=self.task.auto_class,
            model_kwargs=self.task.model_kwargs(),
            revision=context.settings.model_revision,
            device=context.device,
            role_map=context.settings.role_map,
            quantization=context.settings.quantization,
        )
        settings = context.settings
        self.precision = choose_precision(
            settings.precision, context.device, self.backbone.model
        ).precision
        self.activation_cache: ActivationCache | None = None
        if settings.activation_cache:
            self.activation_cache = ActivationCache(
                self.backbone.model,
                self.backbone.layout.blocks,
                context.data,
                device=context.device,
                precision=self.precision,
                max_bytes=int(settings.activation_cache_gb * 2**30),
                folder=Path(context.cache_folder) if context.cache_folder else None,
            )
        self.last_block: Acceleration = NO_ACCELERATION
        if context.window is not None:
            layout = self.backbone.layout
            self.last_block = LastBlock(
                self.backbone.model,
                layout.blocks[-1],
                narrow_modules(self.backbone.model, layout),
                self.task,
                context.window,
                precision=self.precision,
            )
        self.load_seconds = time.perf_counter() - started
        self.packs = True
        self.has_measured_packs = False
        self._run: JobRun | None = None

    def begin(self, job: Job) -> None:
        """Clears the bench and lays the next job on it."""
        self.clear()
        self._run = JobRun(self, job)

    def advance(self) -> Message:
        """Trains the current job to its next message; failures are messages, never exceptions."""
        assert self._run is not None, "begin() comes before advance()"
        run = self._run
        try:
            return run.advance()
        except JOB_ERRORS as error:
            self.clear()
            return failure(error, run)

    def clear(self) -> None:
        """Detaches whatever is attached; the base is pristine again."""
        if self._run is not None:
            self._run.close()
            self._run = None


def failure(error: Exception, run: JobRun) -> FailureMessage:
    """A job has failed: why, in one line, and what it had taken."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return FailureMessage(reason[:500], run.take_activity())


class JobRun:
    """One job in progress.

    Args:
        bench: The worker's.
        job: What to do.
    """

    def __init__(self, bench: Workbench, job: Job) -> None:
        self._bench = bench
        self.job = job
        self._attached: Attached | None = None
        self._training: Trainer | None = None
        self._next_rung = 0
        self._attach_seconds = 0.0
        self._validation_seconds = 0.0
        self._compress_seconds = 0.0
        self._taken = Activity()

    def start(self) -> tuple[Attached, Trainer]:
        """Attaches the candidate, once; what is attached and its training."""
        if self._attached is None or self._training is None:
            bench, job = self._bench, self.job
            started = time.perf_counter()
            self._attached = attach(bench.backbone, job.candidate, seed=job.seed)
            self._training = self._training_of(self._attached, job.candidate)
            self._attach_seconds += time.perf_counter() - started
        return self._attached, self._training

    def _training_of(self, attached: Attached, candidate: Candidate) -> Trainer:
        bench = self._bench
        cache, price = bench.activation_cache, bench.context.prices.price(candidate)
        return Trainer(
            attached,
            bench.task,
            bench.context.data,
            candidate.train,
            seed=self.job.seed,
            device=bench.context.device,
            precision=bench.precision,
            flops_per_step=price.train_flops / candidate.train.steps,
            cache=NO_ACCELERATION if cache is None else cache.below(candidate.plan.lowest_layer),
            last_block=bench.last_block,
            rung_rows=bench.context.settings.rung_rows,
        )

    def take_activity(self) -> Activity:
        """Seconds spent since the last call."""
        training = self._training
        total = Activity(
            train=training.train_seconds if training else 0.0,
            evaluate=(training.evaluation_seconds if training else 0.0) + self._compress_seconds,
            attach=self._attach_seconds,
            cache=training.cache_seconds if training else 0.0,
        )
        taken, self._taken = self._taken, total
        return Activity(
            total.train - taken.train,
            total.evaluate - taken.evaluate,
            total.attach - taken.attach,
            total.cache - taken.cache,
        )

    def advance(self) -> Message:
        """Trains to the next rung, or to the end for a confirmation."""
        attached, training = self.start()
        if self.job.kind == "confirm":
            return self._confirm(attached, training)
        rungs = self._bench.context.rungs
        before = training.evaluation_seconds
        report = training.advance(rungs[self._next_rung])
        self._validation_seconds = training.evaluation_seconds - before
        self._next_rung += 1
        is_last = self._next_rung == len(rungs)
        measured = self._measure(attached, training) if is_last else {}
        return RungMessage(report, is_last, measured, self.take_activity())

    def _measure(self, attached: Attached, training: Trainer) -> dict[str, float]:
        measured = {
            "train_seconds": training.train_seconds,
            "validation_seconds": self._validation_seconds,
        }
        if "latency_ms" in self._bench.context.objectives:
            measured["latency_ms"] = measure_latency_ms(
                attached.model, self._bench.context.data, device=self._bench.context.device
            )
        return measured

    def _confirm(self, attached: Attached, training: Trainer) -> ConfirmMessage:
        job, prices = self.job, self._bench.context.prices
        training.train_to(job.candidate.train.steps)
        price = prices.price(job.candidate)
        score = self._score(attached, training, price)
        files = self._files(attached)
        compressed = tuple(self._compress(attached, price)) if job.lower_ranks else ()
        return ConfirmMessage(score, files, self.take_activity(), price.train_flops, compressed)

    def _score(self, attached: Attached, training: Trainer, price: Price) -> SeedScore:
        names = self._bench.context.objectives
        validation = training.evaluate("validation")
        # Scored in full precision, as whoever loads the adapter will run it.
        test = training.evaluate("test", precision="fp32")
        measured = self._measure(attached, training)
        objectives = {names[0]: test.metrics[names[0]]}
        for name in names[1:]:
            objectives[name] = float(measured[name] if name in measured else price.to_json()[name])
        return SeedScore(
            seed=self.job.seed,
            validation={**validation.metrics, "loss": validation.loss},
            test={**test.metrics, "loss": test.loss},
            test_rows=tuple(float(row) for row in test.rows),
            objectives=objectives,
        )

    def _files(self, attached: Attached) -> dict[str, bytes]:
        context = self._bench.context
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(
                attached,
                Path(folder),
                base_model=context.settings.model,
                revision=context.settings.model_revision,
                extra={
                    "task": self._bench.task.name,
                    "labels": list(context.data.labels),
                    "seed": self.job.seed,
                },
            )
            files = {
                str(path.relative_to(folder)): path.read_bytes()
                for path in sorted(Path(folder).rglob("*"))
                if path.is_file()
            }
        self._attach_seconds += time.perf_counter() - started
        return files

    def _compress(self, attached: Attached, paid: Price) -> Iterator[Compressed]:
        """The trained LoRA at lower ranks; afterwards nothing is attached any more."""
        trained = TrainedLora(attached)
        train_seconds = self._training.train_seconds if self._training else 0.0
        for candidate in self.job.lower_ranks:
            started = time.perf_counter()
            if self._attached is not None:
                self._attached.detach()
            cut = self._attached = attach(self._bench.backbone, candidate, seed=self.job.seed)
            trained.cut_into(cut)
            self._attach_seconds += time.perf_counter() - started
            scoring = self._training_of(cut, candidate)
            # What it costs to come by is the training it was cut from.
            scoring.train_seconds = train_seconds
            own = self._bench.context.prices.price(candidate)
            price = replace(
                own, train_flops=paid.train_flops, peak_memory_bytes=paid.peak_memory_bytes
            )
            score = self._score(cut, scoring, price)
            self._compress_seconds += scoring.evaluation_seconds
            yield Compressed(candidate, price, score, self._files(cut))

    def park(self) -> None:
        """Takes what is attached out of the model, for `unpark` to put back."""
        if self._attached is not None:
            self._attached.park()

    def unpark(self) -> None:
        """Puts back what `park` took out."""
        if self._attached is not None:
            self._attached.unpark()

    def close(self) -> None:
        """Gives the base model back pristine."""
        self._training = None
        if self._attached is not None:
            self._attached.detach()
            self._attached = None
