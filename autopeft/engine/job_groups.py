"""Several jobs of one worker at once, trained in one batched forward. Knows no ray."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

from autopeft.engine.executor import JOB_ERRORS, JobRun, Workbench, failure
from autopeft.engine.messages import ConfirmMessage, FailureMessage, Job, Message, RungMessage
from autopeft.errors import MultiAdapterError
from autopeft.models.multi_adapter import MultiAdapter, can_share_batch, can_share_batch_in
from autopeft.training.acceleration import NO_ACCELERATION
from autopeft.training.multi_trainer import MultiTrainer


def groups_to_pack(jobs: Sequence[Job], size: int) -> list[tuple[Job, ...]]:
    """Jobs in their order, those put together that can be trained together.

    Args:
        jobs: In the order they are to be begun.
        size: Jobs a pack holds at most.
    """
    groups: list[tuple[Job, ...]] = []
    for job in jobs:
        last = groups[-1] if groups else ()
        if last and len(last) < size and _go_together(last[0], job):
            groups[-1] = (*last, job)
        else:
            groups.append((job,))
    return groups


def _go_together(first: Job, other: Job) -> bool:
    one, two = first.candidate.train, other.candidate.train
    return (
        first.kind == other.kind
        and (one.steps, one.batch_size) == (two.steps, two.batch_size)
        and can_share_batch(first.candidate)
        and can_share_batch(other.candidate)
    )


class PackRun:
    """Jobs in progress together.

    They begin together and reach their rungs together; one that is dropped leaves the others a
    smaller batch. Where the model cannot take a pack, or it does not pay, each trains after the
    other, with the same results.

    Args:
        bench: The worker's, with nothing on it.
        jobs: All of one kind, with as many steps and rows a batch.
        must_pay: Whether to measure first if a pack is faster than its jobs one after another.
    """

    def __init__(self, bench: Workbench, jobs: Sequence[Job], *, must_pay: bool = False) -> None:
        self._bench = bench
        self._jobs = tuple(jobs)
        self._must_pay = must_pay
        self._runs: dict[int, JobRun] = {}
        self._rung = 0
        self._failed: dict[int, Message] = {}
        self._packed: MultiTrainer | None = None
        self._start()

    def _start(self) -> None:
        """Attaches every job and parks it."""
        self.close()
        for index, job in enumerate(self._jobs):
            run = JobRun(self._bench, job)
            try:
                run.start()
            except JOB_ERRORS as error:
                self._failed[index] = failure(error, run)
                run.close()
                continue
            run.park()
            self._runs[index] = run
        fits = all(
            can_share_batch_in(job.candidate, self._bench.backbone.layout) for job in self._jobs
        )
        if fits and len(self._runs) > 1 and self._bench.packs:
            self._packed = self._pack()

    def _pack(self) -> MultiTrainer:
        bench, cache = self._bench, self._bench.activation_cache
        started = {index: run.start() for index, run in self._runs.items()}
        lowest = [run.job.candidate.plan.lowest_layer for run in self._runs.values()]
        cut = min(layer for layer in lowest if layer is not None)
        return MultiTrainer(
            {index: training for index, (_, training) in started.items()},
            MultiAdapter({index: attached for index, (attached, _) in started.items()}),
            bench.task,
            bench.context.data,
            device=bench.context.device,
            precision=bench.precision,
            cache=NO_ACCELERATION if cache is None else cache.below(cut),
            last_block=bench.last_block,
            must_pay=self._must_pay and not bench.has_measured_packs,
        )

    def drop(self, indices: Iterable[int]) -> None:
        """Stops these jobs, as far as they are under way."""
        for index in indices:
            run = self._runs.pop(index, None)
            if run is None:
                continue
            run.close()
            if self._packed is not None:
                self._packed.drop(index)

    def advance(self) -> Mapping[int, Message]:
        """Trains all jobs to their next message; index in the pack -> message."""
        messages, self._failed = dict(self._failed), {}
        if self._packed is not None and self._runs:
            messages |= self._train_together(self._packed)
        for index, run in tuple(self._runs.items()):
            messages[index] = self._advance(run)
            if _is_final(messages[index]):
                self.drop([index])
        self._rung += 1
        return messages

    def _train_together(self, packed: MultiTrainer) -> dict[int, Message]:
        """Trains to where all report next. Messages of those that fail on the way."""
        job = self._jobs[0]
        confirms = job.kind == "confirm"
        end = job.candidate.train.steps
        try:
            packed.train_to(end if confirms else self._bench.context.rungs[self._rung])
        except MultiAdapterError as error:
            self._go_apart(f"{error}; they train one after another")
        except RuntimeError as error:
            # Most likely out of memory, which each alone may not be.
            if self._rung:
                failed: dict[int, Message] = {
                    index: failure(error, run) for index, run in self._runs.items()
                }
                self.close()
                return failed
            self._go_apart(f"training candidates together failed ({error}); set pack to 1")
        self._bench.has_measured_packs = True
        messages: dict[int, Message] = {}
        for index, reason in packed.failed.items():
            if index in self._runs:
                run = self._runs.pop(index)
                messages[index] = failure(reason, run)
                run.close()
        return messages

    def _go_apart(self, reason: str) -> None:
        """From the start again, one after another; no later pack is tried on this worker."""
        warnings.warn(reason, stacklevel=2)
        self._bench.packs = False
        self._start()
        self._failed = {}  # Told already.

    def _advance(self, run: JobRun) -> Message:
        run.unpark()
        try:
            return run.advance()
        except JOB_ERRORS as error:
            return failure(error, run)
        finally:
            run.park()

    def close(self) -> None:
        """Gives the base model back pristine."""
        for run in self._runs.values():
            run.close()
        self._runs = {}
        self._packed = None


def _is_final(message: Message) -> bool:
    if isinstance(message, RungMessage):
        return message.is_last
    return isinstance(message, ConfirmMessage | FailureMessage)
