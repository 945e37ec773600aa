"""The Ray backend: a Tune searcher and a Tune scheduler that share one dispatcher."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autopeft.engine.backend import Backend
from autopeft.engine.dispatcher import Dispatcher
from autopeft.engine.job_queue import JobQueue
from autopeft.engine.messages import HungJob, Job, WorkerContext
from autopeft.engine.worker_environment import thread_environment, worker_environment
from autopeft.errors import SettingsError, TrainingFailure
from autopeft.utils.device import n_accelerators
from autopeft.utils.files import is_full, not_written
from autopeft.utils.formatting import one_line
from autopeft.utils.quiet import silence
from autopeft.utils.scratch import scratch_folder

# Ray reads these when it is imported. No telemetry, no result files of Tune's own (the study is the
# record), no handler that would swallow Ctrl-C.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # By default Tune waits until one worker is up before it asks for the next trial.
    "TUNE_MAX_PENDING_TRIALS_PG": "64",
    "RAY_DEDUP_LOGS": "1",
    # Workers that Ray starts in advance lack our environment variables and would never be used.
    "RAY_prestart_worker_first_driver": "0",
    # By default Ray's workers have the lowest priority, and a search beside another job would never
    # start.
    "RAY_worker_niceness": "0",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

# In a notebook, Ray advises on import to install widgets, which nothing here would use.
silence("ray.widgets.util", logging.WARNING)

import ray as ray  # noqa: E402
from ray import tune  # noqa: E402
from ray.tune.schedulers import FIFOScheduler, TrialScheduler  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402

from autopeft.engine.ray_board import Beat, DriverBoard, kill_worker  # noqa: E402
from autopeft.engine.ray_exit import ExitNotice  # noqa: E402
from autopeft.engine.ray_files import offer  # noqa: E402
from autopeft.engine.ray_nodes import alive, n_workers  # noqa: E402
from autopeft.engine.ray_worker import GROUP, MESSAGES, AdapterTrainable, JobGroup  # noqa: E402

_DIED = "the worker died, perhaps for lack of memory"

_ANSWER_SECONDS = 10.0
"""How long a cluster's address may take to answer."""

_WORKERS_PER_AHEAD = 32
"""So many workers share a group of jobs that is proposed before one of them is free."""


class _Failure:
    """Keeps what the driver's own part of the search raised: Tune would make text of it."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the first error that the block raises."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error
            raise


class _NoReports(tune.ProgressReporter):  # type: ignore[misc]
    """Prints nothing. Tune's own reporter clears the output of a notebook's cell."""

    def should_report(self, trials: list[Any], done: bool = False) -> bool:
        """Return False."""
        return False


class _OnDriver:
    """Tune pickles searcher and scheduler to restore them; ours restore from the study instead."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _JobSearcher(_OnDriver, Searcher):  # type: ignore[misc]
    """Tune's searcher: each suggestion is a group of jobs from the dispatcher."""

    def __init__(
        self, dispatcher: Dispatcher, n_workers: int, context: WorkerContext, failure: _Failure
    ) -> None:
        super().__init__(metric=None, mode=None)
        self._failure = failure
        self._dispatcher = dispatcher
        self._queue = JobQueue(dispatcher, context)
        self.n_workers = n_workers
        self.jobs: dict[str, dict[int, Job]] = {}
        self.errors: dict[str, str] = {}
        self.has_started = False
        self.fatal: str | None = None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return jobs as Tune's config; None: ask again later; FINISHED: there will be no more."""
        if self._dispatcher.phase == "done" or self.fatal is not None:
            return str(Searcher.FINISHED)
        # More groups than workers: some are proposed already when workers become free.
        if len(self.jobs) >= self.n_workers + math.ceil(self.n_workers / _WORKERS_PER_AHEAD):
            return None
        with self._failure.kept():
            group = self._queue.next_group()
        if not group:
            return None
        self.jobs[trial_id] = dict(enumerate(group))
        return {GROUP: JobGroup(trial_id, group)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Note the jobs of a worker that died; all others have ended through the scheduler."""
        reason = self.errors.pop(trial_id, None)
        with self._failure.kept():
            for job in self.jobs.pop(trial_id, {}).values():
                if reason is None:
                    self._dispatcher.lose(job, _DIED)
                elif self._dispatcher.is_running(job):
                    self._dispatcher.fail(job, reason)

    def fail_hung(self, hung: HungJob, beats: Mapping[str, Beat]) -> None:
        """Fail a job that hangs, end its worker, and let others of its group be tried again."""
        found = [name for name, jobs in self.jobs.items() if hung.job in jobs.values()]
        for trial_id in found:
            beat = beats.get(trial_id)
            if beat is not None:
                kill_worker(beat)
            jobs = self.jobs.pop(trial_id)
            for job in jobs.values():
                if len(jobs) == 1:
                    self._dispatcher.fail(job, f"the worker hung and was replaced: {hung.reason}")
                else:
                    self._dispatcher.lose(job, f"the worker hung: {hung.reason}")

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Tell Tune that `suggest` limits the concurrency."""
        return True

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the study is the record."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: the study is the record."""


class _RungScheduler(_OnDriver, FIFOScheduler):  # type: ignore[misc]
    """Tune's scheduler: gives each message to the dispatcher, which may stop the job.

    Tune does not forward the result that triggers a stop to the searcher, so all messages go
    through the scheduler.
    """

    def __init__(
        self, dispatcher: Dispatcher, searcher: _JobSearcher, board: DriverBoard, failure: _Failure
    ) -> None:
        super().__init__()
        self._failure = failure
        self._dispatcher = dispatcher
        self._searcher = searcher
        self._board = board

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Take a worker's messages; stop Tune's trial once all of its jobs have ended."""
        with self._failure.kept():
            return self._take(trial, result)

    def _take(self, trial: Any, result: dict[str, Any]) -> str:
        jobs = self._searcher.jobs.get(trial.trial_id)
        if jobs is None or MESSAGES not in result:
            return str(TrialScheduler.STOP)
        self._searcher.has_started = True
        ended = []
        for index, message in result[MESSAGES]:
            if isinstance(message, ray.ObjectRef):
                message = ray.get(message)
            job = jobs.get(index)
            if job is not None and not self._dispatcher.take(job, message):
                ended.append(index)
                del jobs[index]
        if not jobs:
            return str(TrialScheduler.STOP)
        if ended:
            self._board.stop(trial.trial_id, ended)
        return str(TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Keep what a worker raised; a worker that was killed raises only Ray's own error."""
        raised = _raised(trial.pickled_error_file)
        if raised is not None:
            self._searcher.errors[trial.trial_id] = f"the worker failed: {raised.text}"
            if raised.is_in_setup and not self._searcher.has_started:
                # What happens to a worker before it takes a job will happen to all.
                self._searcher.fatal = raised.text
        super().on_trial_error(tune_controller, trial)


class _Clock(_OnDriver, tune.Callback):  # type: ignore[misc]
    """Ticks about once a second, whether workers send results or not; ends workers that hang."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        searcher: _JobSearcher,
        board: DriverBoard,
        failure: _Failure,
        room: Callable[[], int],
    ) -> None:
        self._dispatcher = dispatcher
        self._searcher = searcher
        self._board = board
        self._failure = failure
        self._room = room
        self._ticked_at = time.monotonic()
        self._beats: dict[str, Beat] = {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tick if it is time; Tune calls this after each round of its loop, ten times a second."""
        if time.monotonic() - self._ticked_at > 1.0:
            self._ticked_at = time.monotonic()
            with self._failure.kept():
                self._tick()

    def _tick(self) -> None:
        self._searcher.n_workers = self._room()
        self._dispatcher.note_workers(self._searcher.n_workers)
        told = self._board.take()
        self._beats |= {beat.group: beat for beat in told.beats}
        self._beats = {name: b for name, b in self._beats.items() if name in self._searcher.jobs}
        # A worker that has gone on to other jobs may have told of the last ones late.
        beats = [beat.message for beat in told.beats if beat.group in self._beats]
        for hung in self._dispatcher.tick(told.steps, beats):
            self._searcher.fail_hung(hung, self._beats)


@dataclass(frozen=True)
class _Raised:
    """The last line of what a worker raised, and whether it did while it was set up."""

    text: str
    is_in_setup: bool


def _raised(file: str | None) -> _Raised | None:
    """Return what a worker raised; None if it was killed, or ended itself.

    The file is where Tune has just written the exception. `Trial.get_pickled_error` looks where it
    will be once the trial's folder has been synced.
    """
    if file is None or not Path(file).exists():
        return None
    error = ray.cloudpickle.loads(Path(file).read_bytes())
    is_in_setup = isinstance(error, ray.exceptions.ActorDiedError) and "creation task" in str(error)
    if not (is_in_setup or isinstance(error, ray.exceptions.RayTaskError)):
        return None
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return _Raised(lines[-1][:400], is_in_setup) if lines else None


def _check_listens(address: str) -> None:
    """Check that something listens at `host:port`: Ray itself tries for minutes, and loudly.

    Raises:
        ConnectionError: if nothing does.
    """
    host, colon, port = address.rpartition(":")
    if not colon or "://" in address or not port.isascii() or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(one_line(error)) from error


def join(address: str) -> None:
    """Join a cluster.

    Raises:
        SettingsError: if none answers at the address.
    """
    environment = {"env_vars": thread_environment()}
    try:
        _check_listens(address)
        ray.init(
            address=address,
            runtime_env=environment,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        problem = f"no Ray cluster answers ({type(error).__name__})"
        # Ray tells only its log that a token is missing, and sends none to a named address unasked.
        remedy = (
            "start one with `ray start --head`, set RAY_AUTH_MODE=token if it asks for a token, or "
            "leave it out"
        )
        raise SettingsError("ray_address", address, problem, remedy) from None


def _start_local(**options: Any) -> None:
    """Start a Ray of this search's own, which only this machine can reach.

    By default Ray listens on all interfaces of a Linux machine, and whoever reaches it may run
    code. It has a switch for macOS and Windows, where it listens on the loopback interface alone,
    but none for Linux: `node_ip_address="127.0.0.1"` is replaced by the address of the machine
    (https://github.com/ray-project/ray/issues/18730 is about the switch).

    Args:
        **options: Of `ray.init`.
    """
    from ray._private import ray_constants

    if elsewhere := os.environ.get("RAY_ADDRESS"):
        warnings.warn(
            f"RAY_ADDRESS={elsewhere} is not joined: without ray_address, a search runs on this "
            "machine; set ray_address to run on that cluster",
            stacklevel=2,
        )
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        # Without an address, Ray joins one that happens to run here.
        ray.init(address="local", **options)
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def start_for(context: WorkerContext) -> None:
    """Start a Ray of this search's own with room for its workers."""
    n_bytes = context.data.n_bytes if context.data is not None else 0
    _start_local(
        num_cpus=context.settings.workers or 1,
        # Ray itself finds fewer kinds of accelerators than torch.
        num_gpus=n_accelerators() if context.device != "cpu" else None,
        include_dashboard=False,
        object_store_memory=max(100 * 2**20, 3 * n_bytes),
        runtime_env={"env_vars": worker_environment()},
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def log_of_driver() -> Path | None:
    """Return the log that Ray's library keeps of this process; None if there is none."""
    node = ray._private.worker._global_node
    if node is None:
        return None
    folder = Path(node.get_logs_dir_path())
    return next(folder.glob(f"python-core-driver-*_{os.getpid()}.log"), None)


class RayBackend(Backend):
    """Runs jobs on a Ray cluster, or on a small local Ray that lives as long as the search.

    A Ray that the caller has initialized already is used and left running.
    """

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._n_workers = context.settings.workers or 1
        self._is_ours = False
        self._is_alone = False
        self._notice = ExitStack()

    def __enter__(self) -> RayBackend:
        """Start or join Ray.

        Raises:
            SettingsError: if no cluster answers at the address.
        """
        settings = self._context.settings
        self._is_ours = not ray.is_initialized()
        with ExitStack() as stack:
            notice = stack.enter_context(ExitNotice(settings.output))
            if self._is_ours and settings.ray_address is not None:
                join(settings.ray_address)
            elif self._is_ours:
                start_for(self._context)
                self._is_alone = True
            if (log := log_of_driver()) is not None:
                notice.read(log)
            self._notice = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop or leave a Ray that was started or joined on entering."""
        with self._notice:
            if self._is_ours:
                ray.shutdown()

    def _room(self) -> int:
        """Return how many workers the nodes that are there have room for, of those wanted."""
        if self._is_alone:
            return self._n_workers
        room = n_workers(alive(), self._context.settings.gpus_per_worker or 0.0)
        return room if self._context.is_elastic else min(room, self._n_workers)

    def run(self, dispatcher: Dispatcher) -> None:
        """Run jobs until the dispatcher is done.

        Raises:
            TrainingFailure: if the first workers fail before they have sent a message.
        """
        # A worker's failure is the reason of its trial; Tune would print tracebacks.
        silence("ray.tune", logging.CRITICAL)
        failure = _Failure()
        searcher = _JobSearcher(dispatcher, self._n_workers, self._context, failure)
        board = DriverBoard()
        clock = _Clock(dispatcher, searcher, board, failure, self._room)
        resources = {"cpu": 1.0, "gpu": self._context.settings.gpus_per_worker or 0.0}
        with scratch_folder() as folder:
            context = replace(self._context, cache_folder=str(folder))
            # In a tuple: the worker fetches the context itself, not Ray before `setup`.
            files = None if self._is_alone else offer(context)
            worker = tune.with_parameters(AdapterTrainable, context=(ray.put(context), files))
            tuner = tune.Tuner(
                tune.with_resources(worker, resources),
                tune_config=tune.TuneConfig(
                    search_alg=searcher,
                    scheduler=_RungScheduler(dispatcher, searcher, board, failure),
                    num_samples=-1,
                    reuse_actors=True,
                    trial_dirname_creator=lambda trial: str(trial.trial_id),
                ),
                run_config=tune.RunConfig(
                    storage_path=str(folder),
                    name="search",
                    verbose=0,
                    progress_reporter=_NoReports(),
                    callbacks=[clock],
                    checkpoint_config=tune.CheckpointConfig(
                        checkpoint_frequency=0, checkpoint_at_end=False
                    ),
                ),
            )
            try:
                tuner.fit()
            except Exception as error:
                if failure.error is not None:
                    raise failure.error from None
                if isinstance(error, OSError) and is_full(error):
                    raise not_written("TMPDIR", folder.parent, error) from None
                raise
        if searcher.fatal is not None:
            raise TrainingFailure(f"the workers cannot start: {searcher.fatal}")
