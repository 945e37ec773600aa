"""A backend without Ray: one executor in this process, one job or group of jobs at a time."""

from __future__ import annotations

import warnings
from collections import deque
from contextlib import suppress

from autopeft.engine.backend import Backend
from autopeft.engine.dispatcher import Dispatcher
from autopeft.engine.executors import JobExecutor, make_executor
from autopeft.engine.job_queue import JobQueue
from autopeft.engine.local_watch import Hung, LocalWatch
from autopeft.engine.messages import JOB_ERRORS, FailureMessage, Job, StepMessage, WorkerContext
from autopeft.errors import AutoPeftError, StorageFailure, TrainingFailure
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
            TrainingFailure: if what trains cannot be loaded, or can be used no longer.
        """
        context = self._context
        queue = JobQueue(dispatcher, context)
        groups: deque[tuple[Job, ...]] = deque()
        watch = LocalWatch(dispatcher.new_watch(), dispatcher.say)
        worker = _Worker(dispatcher, context, watch)
        with warnings.catch_warnings(), quiet_transformers(), one_thread(context.device), watch:
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

    def __init__(self, dispatcher: Dispatcher, context: WorkerContext, watch: LocalWatch) -> None:
        self._dispatcher = dispatcher
        self._context = context
        self._watch = watch
        self._executor: JobExecutor | None = None

    def run(self, group: tuple[Job, ...]) -> None:
        """Run jobs to their ends.

        Raises:
            TrainingFailure: if what trains them cannot be loaded.
        """
        if self._executor is None:
            self._executor = self._loaded()
        self._dispatcher.may_die(group)
        try:
            self._run(group, self._executor)
        except BaseException:
            with suppress(StorageFailure):  # What ended it is told, Ctrl-C above all.
                self._dispatcher.survived(group)
            raise
        self._dispatcher.survived(group)

    def _loaded(self) -> JobExecutor:
        try:
            with self._watch.watching(self._dispatcher.seconds_left, is_starting=True):
                return make_executor(self._context, self._on_step)
        except AutoPeftError:
            raise
        except Exception as error:
            reason = one_line(error)[:400]
            raise TrainingFailure(f"the worker cannot start: {reason}") from error

    def _run(self, group: tuple[Job, ...], executor: JobExecutor) -> None:
        running = set(range(len(group)))
        is_begun = False
        while running:
            try:
                with self._watch.watching(self._dispatcher.seconds_left):
                    if not is_begun:
                        executor.begin(group)
                        is_begun = True
                    messages = executor.advance()
            except AutoPeftError:
                raise
            except JOB_ERRORS as error:
                self._abandon(error)
                reason = f"the worker failed: {one_line(error)[:400]}"
                messages = {index: FailureMessage(reason) for index in running}
            for index, message in messages.items():
                if not self._dispatcher.take(group[index], message):
                    running.discard(index)
                    if self._executor is not None:
                        executor.drop([index])

    def _abandon(self, error: BaseException) -> None:
        """Leave an executor in which anything may have been done to the model."""
        # Imported late: a function of the user's may need no torch.
        from autopeft.utils.device import is_broken

        if is_broken(error):
            folder = self._context.settings.output
            raise TrainingFailure(
                f"the device is lost to this process ({one_line(error)[:400]}); ended trials are "
                f"saved: `autopeft resume {folder}` continues in a new process, and with "
                "--backend ray such workers are replaced"
            ) from error
        executor, self._executor = self._executor, None
        if isinstance(error, Hung) and executor is not None:
            executor.clear()

    def _on_step(self, step: StepMessage) -> None:
        self._watch.sign()
        self._dispatcher.tick([step])

    def clear(self) -> None:
        if self._executor is not None:
            self._executor.clear()
