"""Ray Tune at work: a searcher and a scheduler that share one dispatcher."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from autopeft.engine.dispatcher import Dispatcher
from autopeft.engine.executor import WorkerContext
from autopeft.engine.job_groups import groups_to_pack
from autopeft.engine.messages import Job
from autopeft.engine.worker_environment import thread_environment, worker_environment
from autopeft.errors import SettingsError, TrainingFailure
from autopeft.utils.quiet import silence
from autopeft.utils.scratch import scratch_folder

# Read by ray when it is imported, so they must be set before. No telemetry, no result files of
# Tune's own (the study is the record), no handler that would swallow Ctrl-C.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # The searcher hands out one job more than there are workers; by default Tune would wait for
    # each worker to be up before it asks for the next.
    "TUNE_MAX_PENDING_TRIALS_PG": "64",
    "RAY_DEDUP_LOGS": "1",
    # Workers that Ray starts before it is told what they are to be started with are of no use.
    "RAY_prestart_worker_first_driver": "0",
    # By default Ray's workers give way to everything else on the machine, and a search beside
    # another job would never start.
    "RAY_worker_niceness": "0",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray.tune.schedulers import FIFOScheduler, TrialScheduler  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402

from autopeft.engine.ray_stops import call_stops, hold_stops  # noqa: E402
from autopeft.engine.ray_worker import JOBS, MESSAGES, PACK, AdapterTrainable  # noqa: E402

_DIED = "the worker died, perhaps for lack of memory"


class _OnDriver:
    """Tune pickles searcher and scheduler to restore them; ours restore from the study instead."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _JobSearcher(_OnDriver, Searcher):  # type: ignore[misc]
    """Asks the dispatcher for jobs, and puts those that can be trained together into packs."""

    def __init__(self, dispatcher: Dispatcher, n_workers: int, pack: int) -> None:
        super().__init__(metric=None, mode=None)
        self._dispatcher = dispatcher
        self._n_workers = n_workers
        self._pack = pack
        self._waiting: list[Job] = []
        self.jobs: dict[str, dict[int, Job]] = {}
        self.errors: dict[str, str] = {}
        self.given_up: str | None = None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """A job as Tune's config; None: ask again later; FINISHED: never again."""
        if self._dispatcher.phase == "done" or self.given_up is not None:
            return str(Searcher.FINISHED)
        # One job more than workers: it waits fully proposed while they train.
        if len(self.jobs) > self._n_workers:
            return None
        while len(self._waiting) < self._pack:
            job = self._dispatcher.next_job()
            if job is None:
                break
            self._waiting.append(job)
        if not self._waiting:
            return None
        group = groups_to_pack(self._waiting, self._pack)[0]
        del self._waiting[: len(group)]
        self.jobs[trial_id] = dict(enumerate(group))
        return {JOBS: json.dumps([job.to_json() for job in group]), PACK: trial_id}

    def give_up(self, reason: str) -> None:
        """Hands out nothing more."""
        self.given_up = reason

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tells the dispatcher about a worker that died; all else came through the scheduler."""
        reason = self.errors.pop(trial_id, _DIED)
        for job in self.jobs.pop(trial_id, {}).values():
            if self._dispatcher.is_running(job):
                self._dispatcher.fail(job, reason)

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Concurrency is limited here."""
        return True

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study is the record."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the study is the record."""


class _RungScheduler(_OnDriver, FIFOScheduler):  # type: ignore[misc]
    """Passes each message to the dispatcher, which may stop the trial.

    Ray does not forward the report that triggers a stop to the searcher, so all is told here.
    """

    def __init__(self, dispatcher: Dispatcher, searcher: _JobSearcher) -> None:
        super().__init__()
        self._dispatcher = dispatcher
        self._searcher = searcher
        self._has_heard = False

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        jobs = self._searcher.jobs.get(trial.trial_id)
        if jobs is None or MESSAGES not in result:
            return str(TrialScheduler.STOP)
        self._has_heard = True
        was_pack, stopped = len(jobs) > 1, []
        for index, message in result[MESSAGES]:
            if isinstance(message, ray.ObjectRef):
                message = ray.get(message)
            job = jobs.get(index)
            if job is not None and not self._dispatcher.take(job, message):
                stopped.append(index)
                del jobs[index]
        if not jobs:
            return str(TrialScheduler.STOP)
        if was_pack and stopped:
            call_stops(trial.trial_id, stopped)
        return str(TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Keeps what a worker raised; one that died without a word raises Ray's own error."""
        raised = _raised(trial.pickled_error_file)
        if raised is not None:
            self._searcher.errors[trial.trial_id] = f"the worker failed: {raised}"
            if not self._has_heard:
                # What happens to the first one before any message will happen to all.
                self._searcher.give_up(raised)
        super().on_trial_error(tune_controller, trial)


def _raised(file: str | None) -> str | None:
    """What the worker's code raised, as a traceback's last line has it; None if it just died.

    Args:
        file: Where Tune has just written the exception; `Trial.get_pickled_error` looks where it
            will be once the trial's folder has been synced.
    """
    if file is None or not Path(file).exists():
        return None
    error = ray.cloudpickle.loads(Path(file).read_bytes())
    is_ours = isinstance(error, ray.exceptions.RayTaskError) or (
        isinstance(error, ray.exceptions.ActorDiedError) and "creation task" in str(error)
    )
    lines = str(error).split("\n") if is_ours else []
    return next((line.strip()[:400] for line in reversed(lines) if line.strip()), None)


class RaySession:
    """A local Ray, small and quiet, or a cluster joined; stopped or left on exit.

    A Ray that the caller has started already is used as it is and left running.

    Args:
        address: Address of a cluster; None for a local Ray.
        n_workers: Workers a local Ray has room for.
        object_bytes: Bytes of data to be shared with the workers.

    Raises:
        SettingsError: if no cluster answers at the address.
    """

    def __init__(self, address: str | None, *, n_workers: int, object_bytes: int) -> None:
        self._is_ours = not ray.is_initialized()
        if not self._is_ours:
            return
        variables = worker_environment() if address is None else thread_environment()
        environment = {"env_vars": variables}
        if address is None:
            ray.init(
                num_cpus=n_workers,
                include_dashboard=False,
                object_store_memory=max(100 * 2**20, 3 * object_bytes),
                runtime_env=environment,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        try:
            ray.init(address=address, runtime_env=environment, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise SettingsError(
                "ray_address",
                address,
                f"no Ray cluster answers ({type(error).__name__})",
                "start one with `ray start --head`, or leave it out",
            ) from None

    def __enter__(self) -> RaySession:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_ours:
            ray.shutdown()


def run(
    dispatcher: Dispatcher,
    context: WorkerContext,
    *,
    n_workers: int,
    gpus_per_worker: float,
    pack: int = 1,
) -> None:
    """Works until the dispatcher is done. Ray must have been started.

    Raises:
        TrainingFailure: if the first workers fail before they have told anything.
    """
    # A worker's failure is told by its trial's reason; Tune would print tracebacks.
    silence("ray.tune", logging.CRITICAL)
    searcher = _JobSearcher(dispatcher, n_workers, pack)
    # Held here: the actor lives as long as something refers to it.
    _stops = hold_stops() if pack > 1 else None
    resources = {"cpu": 1.0, "gpu": gpus_per_worker}
    with scratch_folder() as folder:
        held = (ray.put(replace(context, cache_folder=str(folder))),)
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(AdapterTrainable, held=held), resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=_RungScheduler(dispatcher, searcher),
                num_samples=-1,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                storage_path=str(folder),
                name="search",
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(
                    checkpoint_frequency=0, checkpoint_at_end=False
                ),
            ),
        )
        tuner.fit()
    if searcher.given_up is not None:
        raise TrainingFailure(f"the workers cannot start: {searcher.given_up}")
