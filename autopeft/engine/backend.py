"""Backend: what runs a dispatcher's jobs on workers; and the choice of one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from autopeft.engine.dispatcher import Dispatcher
from autopeft.engine.messages import WorkerContext
from autopeft.settings import SearchSettings
from autopeft.utils.gc import paused_gc


class Backend(AbstractContextManager["Backend", None], Protocol):
    """Runs jobs until the dispatcher has no more.

    A backend is a context manager: entering it starts what its workers need, leaving it stops that.
    Its workers run jobs with an `autopeft.engine.executor.Executor`; its driver calls
    `dispatcher.next_job()` for each job, gives every message to `dispatcher.take()`, stops a job
    for which that returns False, and calls `dispatcher.fail()` for jobs that are lost. All calls of
    the dispatcher come from one thread.
    """

    def run(self, dispatcher: Dispatcher, context: WorkerContext) -> None:
        """Run jobs until `dispatcher.phase` is "done".

        Raises:
            TrainingFailure: if workers cannot start.
            KeyboardInterrupt: if the user stops the search.
        """
        ...


def make_backend(settings: SearchSettings, *, trials_per_worker: int, object_bytes: int) -> Backend:
    """Make the backend that the resolved settings name.

    Its workers share `object_bytes` of data; each trains at most `trials_per_worker` together.
    """
    # Imported late: users learn of mistakes in their settings without waiting for torch and ray.
    with paused_gc():
        if settings.backend == "local":
            from autopeft.engine.local_backend import LocalBackend

            return LocalBackend(trials_per_worker)
        from autopeft.engine.ray_backend import RayBackend

        return RayBackend(
            settings.ray_address,
            n_workers=settings.workers or 1,
            gpus_per_worker=settings.gpus_per_worker or 0.0,
            trials_per_worker=trials_per_worker,
            object_bytes=object_bytes,
        )
