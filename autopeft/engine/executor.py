"""Runs jobs on one loaded model: one job, or several of them trained together. Imports no ray."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from autopeft.engine.job_execution import JobExecution
from autopeft.engine.loaded_model import LoadedModel
from autopeft.engine.messages import (
    JOB_ERRORS,
    Job,
    Message,
    OnStep,
    WorkerContext,
    ignore_step,
    is_final,
)
from autopeft.errors import MultiAdapterError
from autopeft.models.multi_adapter import can_share_batch_in
from autopeft.training.multi_trainer import MultiTrainer
from autopeft.utils.device import empty_cache, is_broken, is_out_of_memory


class Executor(LoadedModel):
    """Loads the base model once, then runs one list of jobs after another on it.

    The jobs of a list reach their rungs together; where they can be, they are trained in one
    batched forward. Where the model does not allow that, or it is not faster, each trains after the
    other, with the same results. Failures are messages, never exceptions.

    Attributes:
        trains_together: False once jobs could not be trained together, or it was not faster.
        has_compared: Whether the speed of training together has been measured.

    Example:
        ```python
        executor = Executor(prepared.context())
        executor.begin([job])
        while not is_final(message := executor.advance()[0]):
            print(message.report.metrics)
        ```
    """

    def __init__(self, context: WorkerContext, on_step: OnStep = ignore_step) -> None:
        super().__init__(context)
        self._on_step = on_step
        self.trains_together = self.setup.task.can_share_batch and not context.settings.trains_alone
        self.has_compared = False
        self._has_run_out = False
        self._jobs: tuple[Job, ...] = ()
        self._executions: dict[int, JobExecution] = {}
        self._rung = 0
        self._together: MultiTrainer | None = None

    def begin(self, jobs: Sequence[Job]) -> None:
        """Detach what is left of earlier jobs and take these.

        They are of one kind, with the same rungs, number of steps and rows a batch.
        """
        self.clear()
        self._jobs = tuple(jobs)
        self._executions = {index: self._execution(job) for index, job in enumerate(jobs)}
        self._rung = 0
        self.leave_room_for([job.candidate for job in jobs])

    def _execution(self, job: Job) -> JobExecution:
        return JobExecution(self, job, self._on_step)

    def advance(self) -> dict[int, Message]:
        """Train to the next message of each job; return them by the job's index."""
        messages: dict[int, Message] = {}
        if self._rung == 0:
            messages |= self._start()
        if self._together is not None and self._executions:
            messages |= self._train_together(self._together)
        for index, execution in tuple(self._executions.items()):
            try:
                execution.unpark()
                messages[index] = execution.advance()
            except JOB_ERRORS as error:
                messages[index] = self._failure(execution, error)
            finally:
                execution.park()
            if is_final(messages[index]):
                self.drop([index])
        self._clean()
        self._rung += 1
        return messages

    def _failure(self, execution: JobExecution, error: BaseException) -> Message:
        """Return why a job failed. What every later job would meet ends the worker instead."""
        if is_broken(error):
            raise error
        self._has_run_out |= is_out_of_memory(error)
        return execution.failure(error)

    def _clean(self) -> None:
        """Give back what torch keeps for later, after it ran out: neighbours share the device."""
        if self._has_run_out:
            self._has_run_out = False
            empty_cache(self.context.device)

    def drop(self, indices: Iterable[int]) -> None:
        """Stop these jobs, those of them that are still in progress."""
        for index in indices:
            execution = self._executions.pop(index, None)
            if execution is None:
                continue
            execution.close()
            if self._together is not None:
                self._together.drop(index)
        self._raise_cut()

    def _raise_cut(self) -> None:
        """Compute no block below the lowest adapter of those that are still trained together."""
        if self._together is not None and self._executions:
            self._together.setup = self.setup_above(self._cut())

    def _cut(self) -> int:
        """Return the lowest block that an adapter in progress changes."""
        plans = [execution.job.candidate.plan for execution in self._executions.values()]
        return min(plan.lowest_layer for plan in plans if plan.lowest_layer is not None)

    def clear(self) -> None:
        """Detach all candidates; the base model is as it was when loaded."""
        for execution in self._executions.values():
            execution.close()
        self._executions = {}
        self._together = None

    def _start(self) -> dict[int, Message]:
        """Attach each job and park it; return the failures by index."""
        failed: dict[int, Message] = {}
        for index, execution in tuple(self._executions.items()):
            try:
                execution.start()
                execution.park()
            except JOB_ERRORS as error:
                failed[index] = self._failure(execution, error)
                self.drop([index])
        self._clean()
        layout, settings = self.backbone.layout, self.context.settings
        trainers = {index: execution.start() for index, execution in self._executions.items()}
        if (
            self.trains_together
            and len(trainers) > 1
            and all(can_share_batch_in(job.candidate, layout) for job in self._jobs)
        ):
            # Unless the user asked for it, training together must prove faster once.
            must_pay = settings.trials_per_worker is None and not self.has_compared
            self._together = MultiTrainer(
                trainers, self.setup_above(self._cut()), must_pay=must_pay
            )
        return failed

    def _train_together(self, trainer: MultiTrainer) -> dict[int, Message]:
        """Train to where all jobs report next; return the failures on the way by index."""
        job = self._jobs[0]
        end = job.candidate.train.steps
        messages: dict[int, Message] = {}
        try:
            trainer.train_to(end if job.kind == "confirm" else job.rungs(self.context)[self._rung])
        except MultiAdapterError as error:
            messages |= self._separate(f"{error}; they train one after another")
        except JOB_ERRORS as error:
            # Most likely out of memory, for which each alone may have enough.
            if self._rung:
                for index, execution in self._executions.items():
                    messages[index] = self._failure(execution, error)
                self.clear()
                return messages
            if is_broken(error):
                raise
            self._has_run_out |= is_out_of_memory(error)
            messages |= self._separate(
                f"training candidates together failed ({error}); set trials_per_worker to 1"
            )
        self.has_compared = True
        for index, reason in trainer.failed.items():
            if index in self._executions:
                execution = self._executions.pop(index)
                messages[index] = execution.failure(reason)
                execution.close()
        self._raise_cut()
        return messages

    def _separate(self, reason: str) -> dict[int, Message]:
        """Start again, one job after another, and so with later jobs; return new failures."""
        warnings.warn(reason, stacklevel=2)
        self.trains_together = False
        under_way = tuple(self._executions)
        self.clear()
        self._executions = {index: self._execution(self._jobs[index]) for index in under_way}
        return self._start()
