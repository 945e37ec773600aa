"""Ray Tune at work: a searcher and a scheduler that share one dispatcher, and the worker actor."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from typing import Any

from autopeft.engine.dispatcher import Dispatcher
from autopeft.engine.jobs import ConfirmMessage, Job
from autopeft.engine.workbench import Workbench, WorkerContext
from autopeft.errors import SettingsError

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
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray.tune.schedulers import FIFOScheduler, TrialScheduler  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402

_MESSAGE = "message"
_JOB = "job"


class AdapterTrainable(tune.Trainable):  # type: ignore[misc]
    """The worker: one Workbench for the actor's life, one job after another on it."""

    def setup(self, config: dict[str, Any], context: WorkerContext) -> None:
        """Loads the base model, once a worker."""
        import torch

        if context.device == "cpu":
            # Two threads in a process that shares its cores with another worker are over 20x
            # slower than one each.
            torch.set_num_threads(1)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self._bench = Workbench(context)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Lays the next job on the bench: the actor, and its model, live on."""
        self._begin(new_config)
        return True

    def _begin(self, config: Mapping[str, Any]) -> None:
        self._bench.begin(Job.from_json(json.loads(config[_JOB])))

    def step(self) -> dict[str, Any]:
        """Trains to the job's next message."""
        message = self._bench.advance()
        # Files are too large for Tune's own results.
        return {_MESSAGE: ray.put(message) if isinstance(message, ConfirmMessage) else message}

    def cleanup(self) -> None:
        """Detaches what is attached."""
        self._bench.clear()


class _OnDriver:
    """Tune pickles searcher and scheduler to restore them; ours restore from the study instead."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _JobSearcher(_OnDriver, Searcher):  # type: ignore[misc]
    """Asks the dispatcher for jobs."""

    def __init__(self, dispatcher: Dispatcher, n_workers: int) -> None:
        super().__init__(metric=None, mode=None)
        self._dispatcher = dispatcher
        self._n_workers = n_workers
        self.jobs: dict[str, Job] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """A job as Tune's config; None: ask again later; FINISHED: never again."""
        if self._dispatcher.phase == "done":
            return str(Searcher.FINISHED)
        # One job more than workers: it waits fully proposed while they train.
        if len(self.jobs) > self._n_workers:
            return None
        job = self._dispatcher.next_job()
        if job is None:
            return None
        self.jobs[trial_id] = job
        return {_JOB: json.dumps(job.to_json())}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tells the dispatcher about a worker that died; all else came through the scheduler."""
        job = self.jobs.pop(trial_id, None)
        if job is not None and self._dispatcher.is_running(job):
            self._dispatcher.fail(job, "the worker died, perhaps for lack of memory")

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

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        job = self._searcher.jobs.get(trial.trial_id)
        if job is None or _MESSAGE not in result:
            return str(TrialScheduler.STOP)
        message = result[_MESSAGE]
        if isinstance(message, ray.ObjectRef):
            message = ray.get(message)
        go_on = self._dispatcher.take(job, message)
        return str(TrialScheduler.CONTINUE if go_on else TrialScheduler.STOP)


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
        environment = {"env_vars": {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}}
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
    dispatcher: Dispatcher, context: WorkerContext, *, n_workers: int, gpus_per_worker: float
) -> None:
    """Works until the dispatcher is done. Ray must have been started."""
    searcher = _JobSearcher(dispatcher, n_workers)
    resources = {"cpu": 1.0, "gpu": gpus_per_worker}
    with tempfile.TemporaryDirectory(prefix="autopeft-tune-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(AdapterTrainable, context=context), resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=_RungScheduler(dispatcher, searcher),
                num_samples=-1,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                storage_path=folder,
                name="search",
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(
                    checkpoint_frequency=0, checkpoint_at_end=False
                ),
            ),
        )
        tuner.fit()
