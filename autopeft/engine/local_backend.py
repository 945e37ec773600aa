"""A backend without Ray: one executor in this process, one job or group of jobs at a time."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Collection

from autopeft.engine.backend import Backend
from autopeft.engine.dispatcher import Dispatcher
from autopeft.engine.executors import JobExecutor, make_executor
from autopeft.engine.job_queue import JobQueue
from autopeft.engine.messages import FailureMessage, Job, Message, StepMessage, WorkerContext
from autopeft.errors import AutoPeftError, TrainingFailure
from autopeft.utils.formatting import one_line
from autopeft.utils.hardware import one_thread
from autopeft.utils.quiet import quiet_transformers


class LocalBackend(Backend):
    """Runs all jobs in this process, with the results of one Ray worker.

    Warnings are hidden meanwhile, as Ray hides those of its workers.
    """

    def __init__(self, context: WorkerContext) -> None:
        self._context = context

    def __enter__(self) -> LocalBackend:
        return self

    def __exit__(self, *error: object) -> None:
        """Stop nothing: there are no workers."""

    def run(self, dispatcher: Dispatcher) -> None:
        """Run jobs until the dispatcher is done.

        Raises:
            TrainingFailure: if the model cannot be loaded, or the first job ends in an error that
                no single candidate can cause.
        """
        context = self._context
        queue = JobQueue(dispatcher, context)
        groups: deque[tuple[Job, ...]] = deque()
        worker = _Worker(dispatcher, context)
        with warnings.catch_warnings(), quiet_transformers(), one_thread(context.device):
            warnings.simplefilter("ignore")
            try:
                while True:
                    # One group waits while another one trains, as with Ray: so the search proposes
                    # the same candidates.
                    while len(groups) < 2 and (group := queue.next_group()):
                        groups.append(group)
                    if not groups:
                        return
                    worker.run(groups.popleft())
            finally:
                worker.clear()


class _Worker:
    """An executor that is created again after an unexpected error."""

    def __init__(self, dispatcher: Dispatcher, context: WorkerContext) -> None:
        self._dispatcher = dispatcher
        self._context = context
        self._executor: JobExecutor | None = None
        self._is_new = True

    def run(self, group: tuple[Job, ...]) -> None:
        """Run jobs to their ends."""
        if self._executor is not None:
            self._executor.begin(group)
        running = set(range(len(group)))
        while running:
            for index, message in self._advance(group, running).items():
                if not self._dispatcher.take(group[index], message):
                    running.discard(index)
                    if self._executor is not None:
                        self._executor.drop([index])

    def _advance(self, group: tuple[Job, ...], running: Collection[int]) -> dict[int, Message]:
        """Train to the next message of each running job."""
        try:
            if self._executor is None:
                self._executor = make_executor(self._context, self._on_step)
                self._executor.begin(group)
            messages = self._executor.advance()
        except AutoPeftError:
            raise
        except Exception as error:
            # Imported late: a function of the user's may need no torch.
            from autopeft.utils.device import is_broken

            reason = one_line(error)[:400]
            if is_broken(error):
                raise TrainingFailure(
                    f"the device is lost to this process ({reason}); resume the search in a new "
                    "one, or use --backend ray, which replaces such workers"
                ) from error
            if self._is_new:
                # What happens before any message will happen to every job.
                raise TrainingFailure(f"the worker cannot start: {reason}") from error
            self._executor = None  # The model may be in any state.
            return {index: FailureMessage(f"the worker failed: {reason}") for index in running}
        self._is_new = False
        return messages

    def _on_step(self, step: StepMessage) -> None:
        self._dispatcher.tick([step])

    def clear(self) -> None:
        if self._executor is not None:
            self._executor.clear()
