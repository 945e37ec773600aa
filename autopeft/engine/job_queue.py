"""The driver's queue: asks the dispatcher for jobs and groups those that are trained together."""

from __future__ import annotations

from collections.abc import Sequence

from autopeft.engine.dispatcher import Dispatcher
from autopeft.engine.messages import Job
from autopeft.models.multi_adapter import can_share_batch


class JobQueue:
    """Asks a dispatcher for jobs and hands them out in groups of at most `group_size`."""

    def __init__(self, dispatcher: Dispatcher, group_size: int) -> None:
        self._dispatcher = dispatcher
        self._group_size = group_size
        self._waiting: list[Job] = []

    def next_group(self) -> tuple[Job, ...]:
        """Return jobs for one worker; () if there are none now."""
        while len(self._waiting) < self._group_size:
            job = self._dispatcher.next_job()
            if job is None:
                break
            self._waiting.append(job)
        if not self._waiting:
            return ()
        group = group_jobs(self._waiting, self._group_size)[0]
        del self._waiting[: len(group)]
        return group


def group_jobs(jobs: Sequence[Job], size: int) -> list[tuple[Job, ...]]:
    """Group neighbors that can be trained together, at most `size` of them, in order."""
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
