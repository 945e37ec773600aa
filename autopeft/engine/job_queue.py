"""The driver's queue: asks the dispatcher for jobs and groups those that are trained together."""

from __future__ import annotations

from autopeft.engine.dispatcher import Dispatcher
from autopeft.engine.messages import Job, WorkerContext
from autopeft.models.multi_adapter import can_share_batch


class JobQueue:
    """Asks a dispatcher for jobs and groups those that a worker's memory holds at once.

    Args:
        dispatcher: Hands out jobs.
        context: Says how many are trained together at most, their prices, and the memory.
    """

    def __init__(self, dispatcher: Dispatcher, context: WorkerContext) -> None:
        self._dispatcher = dispatcher
        self._context = context
        self._waiting: list[Job] = []

    def next_group(self) -> tuple[Job, ...]:
        """Return jobs for one worker; () if there are none now."""
        waiting, context = self._waiting, self._context
        most = context.trials_per_worker
        while len(waiting) < most and (job := self._dispatcher.next_job()) is not None:
            waiting.append(job)
        size = 1
        while (
            size < min(most, len(waiting))
            and _go_together(waiting[0], waiting[size])
            and context.fits([job.candidate for job in waiting[: size + 1]])
        ):
            size += 1
        self._waiting = waiting[size:]
        return tuple(waiting[:size])


def _go_together(first: Job, other: Job) -> bool:
    one, two = first.candidate.train, other.candidate.train
    return (
        not (first.is_alone or other.is_alone)
        and (first.kind, first.skipped) == (other.kind, other.skipped)
        and (one.steps, one.batch_size) == (two.steps, two.batch_size)
        and can_share_batch(first.candidate)
        and can_share_batch(other.candidate)
    )
