"""One job in progress on a worker: attach, train to rungs, confirm, save."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from autopeft.confirm.finalists import CUT_DIVISORS, Compressed, SeedScore
from autopeft.costs import Price
from autopeft.costs.objectives import reported_beside, with_costs
from autopeft.engine.loaded_model import LoadedModel
from autopeft.engine.messages import (
    Activity,
    ConfirmMessage,
    FailureMessage,
    Job,
    OnStep,
    RungMessage,
    StepMessage,
    TimeUpMessage,
    ignore_step,
)
from autopeft.errors import OutOfTime
from autopeft.models.attach import Attached, attach
from autopeft.models.rank_cut import TrainedLora
from autopeft.models.saving import save_adapter
from autopeft.plan import Candidate
from autopeft.tasks.data import OutputScale, SplitName
from autopeft.training.measuring import Trained, measure_costs
from autopeft.training.second_scores import measure_all
from autopeft.training.step_clock import StepClock
from autopeft.training.trainer import Trainer
from autopeft.utils.formatting import one_line
from autopeft.utils.scratch import scratch_folder

N_DRAWS = 1000
"""Resamples of the test rows, for a quality that is no mean over them."""

_HALVED = (
    "a step with {} rows does not fit into the device's memory, so its gradient is computed from "
    "half of them at a time; --micro-batch-tokens or --max-length make it smaller"
)


class JobExecution:
    """One job in progress on a loaded model."""

    def __init__(self, base: LoadedModel, job: Job, on_step: OnStep = ignore_step) -> None:
        self._base = base
        self.job = job
        self._clock = StepClock(job.deadline, lambda *at: on_step(StepMessage.of(job, *at)))
        self._attached: Attached | None = None
        self._training: Trainer | None = None
        self._next_rung = 0
        self._attach_seconds = 0.0
        self._compress_seconds = 0.0
        self._reported = Activity()

    def start(self) -> Trainer:
        """Attach the candidate on the first call; return its training."""
        if self._training is None:
            self._clock.check()
            job, started = self.job, time.perf_counter()
            self._attached = attach(self._base.backbone, job.candidate, seed=job.seed)
            self._training = self._training_of(self._attached, job.costs)
            self._attach_seconds += time.perf_counter() - started
        return self._training

    def _training_of(self, attached: Attached, costs: Price) -> Trainer:
        candidate = attached.candidate
        return Trainer(
            attached,
            self._base.setup_above(candidate.plan.lowest_layer),
            candidate.train,
            seed=self.job.seed,
            flops_per_step=costs.train_flops / candidate.train.steps,
            rung_rows=self._base.context.settings.rung_rows,
            clock=self._clock,
            # A finalist's bad seeds count: without them, the mean of the others would flatter it.
            ends_early=self.job.kind == "search",
            meters=self._base.meters,
        )

    def failure(self, error: BaseException) -> FailureMessage | TimeUpMessage:
        """Return the message that says why the job failed, in one line, or that its time is up."""
        if isinstance(error, OutOfTime):
            step, flops = (t.step, t.flops) if (t := self._training) is not None else (0, 0.0)
            return TimeUpMessage(step, flops, self._new_activity())
        reason = one_line(error)
        return FailureMessage(reason[:500], self._new_activity())

    def _new_activity(self) -> Activity:
        """Return the seconds spent since the last message."""
        training = self._training
        total = Activity(
            train=training.train_seconds + training.compile_seconds if training else 0.0,
            evaluate=(training.evaluation_seconds if training else 0.0) + self._compress_seconds,
            attach=self._attach_seconds,
            cache=training.cache_seconds if training else 0.0,
        )
        new, self._reported = total - self._reported, total
        return new

    def advance(self) -> RungMessage | ConfirmMessage:
        """Train to the next rung, or to the end for a confirmation; may raise `JOB_ERRORS`."""
        training = self.start()
        if self.job.kind == "confirm":
            return self._confirm(training)
        rungs = self.job.rungs(self._base.context)
        before = training.evaluation_seconds
        report = training.advance(rungs[self._next_rung])
        self._next_rung += 1
        is_last = self._next_rung == len(rungs)
        seconds = training.evaluation_seconds - before
        if is_last:
            measured = self._measure(training, "validation", validation_seconds=seconds)
        else:
            measured = self._further(training)
        warning = _HALVED.format(self.job.candidate.train.batch_size) if training.is_halved else ""
        warning = warning or self._base.problem
        return RungMessage(report, is_last, measured, self._new_activity(), warning)

    def _measure(
        self, training: Trainer, split: SplitName, *, validation_seconds: float = 0.0
    ) -> dict[str, float]:
        context = self._base.context
        measured = {
            "train_seconds": training.train_seconds,
            "validation_seconds": validation_seconds,
        }
        trained = Trained(
            training.attached,
            self._base.setup.data,
            self._base.setup.task,
            context.settings,
            context.device,
            self._base.test_precision,
            training.train_seconds,
        )
        measured |= training.metered | measure_costs(context.measured, trained)
        return measured | measure_all(self._base.second, training, split)

    def _further(self, training: Trainer) -> dict[str, float]:
        """Return the further qualities at a rung, which the pruner compares; {} if none matters."""
        context = self._base.context
        compared = [each for each in self._base.second if each.second.name in context.objectives]
        return measure_all(compared, training, "validation", context.settings.rung_rows)

    def _confirm(self, training: Trainer) -> ConfirmMessage:
        job = self.job
        training.train_to(job.candidate.train.steps)
        score = self._score(training, job.costs)
        files = self._files(training.attached)
        compressed = tuple(self._compress(training)) if job.compress else ()
        return ConfirmMessage(score, files, self._new_activity(), job.costs.train_flops, compressed)

    def _score(self, training: Trainer, costs: Price) -> SeedScore:
        names = self._base.context.objectives
        validation = training.evaluate("validation")
        # As users who load the adapter will run it.
        precision = self._base.test_precision
        test = training.evaluate("test", precision=precision, n_draws=N_DRAWS)
        measured = self._measure(training, "test")
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
            further=reported_beside(measured, self._base.context.limited),
        )

    def _files(self, attached: Attached) -> dict[str, bytes]:
        context = self._base.context
        started = time.perf_counter()
        scale = self._base.setup.data.output_scale or OutputScale()
        settings = context.settings
        base_model, revision = context.base_model or (settings.model, settings.model_revision)
        with scratch_folder() as folder:
            save_adapter(
                attached,
                folder,
                base_model=base_model,
                revision=revision,
                extra={
                    "task": self._base.setup.task.name,
                    "labels": list(self._base.setup.data.labels),
                    "seed": self.job.seed,
                },
                shift=scale.shift,
                factor=scale.factor,
            )
            files = {
                str(path.relative_to(folder)): path.read_bytes()
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
        self._attach_seconds += time.perf_counter() - started
        return files

    def _compress(self, training: Trainer) -> Iterator[Compressed]:
        """Yield the trained LoRA cut to fewer parameters; the last of them stays attached."""
        job, table, attached = self.job, self._base.context.prices, training.attached
        assert table is not None, "a search that trains itself has prices"
        prices = with_costs(table, job.costs.others)
        trained, paid = TrainedLora(attached), job.costs
        train = job.candidate.train
        for candidate in job.cuts or [Candidate(p, train) for p in trained.cuts(CUT_DIVISORS)]:
            own, started = prices.price(candidate), time.perf_counter()
            attached.detach()
            attached = self._attached = attach(self._base.backbone, candidate, seed=self.job.seed)
            trained.cut_into(attached)
            self._attach_seconds += time.perf_counter() - started
            scoring = self._training_of(attached, own)
            # Producing it cost the training that it was cut from.
            scoring.train_seconds = training.train_seconds
            scoring.metered = dict(training.metered)
            costs = replace(
                own, train_flops=paid.train_flops, peak_memory_bytes=paid.peak_memory_bytes
            )
            try:
                score = self._score(scoring, costs)
            except OutOfTime:
                return  # What was confirmed is kept.
            finally:
                self._compress_seconds += scoring.evaluation_seconds
            yield Compressed(candidate, costs, score, self._files(attached))

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
