"""The worker actor: jobs and packs come in, messages go out.

Every worker imports this before its first step, so it knows nothing of the search.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from autopeft.engine.messages import ConfirmMessage, Job, Message
from autopeft.engine.ray_stops import stops_of
from autopeft.utils.gc import paused_gc
from autopeft.utils.quiet import silence

if TYPE_CHECKING:
    from autopeft.engine.executor import WorkerContext
    from autopeft.engine.job_groups import PackRun

MESSAGES = "messages"
"""Key of a result: pairs of a job's place in its pack and its message."""

JOBS = "jobs"
"""Key of a config: the jobs as JSON; more than one are a pack."""

PACK = "pack"
"""Key of a config: the pack's name."""


class AdapterTrainable(tune.Trainable):  # type: ignore[misc]
    """The worker: one Workbench for the actor's life, one job or pack after another on it."""

    def setup(self, config: dict[str, Any], held: tuple[ray.ObjectRef]) -> None:
        """Loads the base model, once a worker.

        Args:
            config: The first jobs.
            held: Where the context is. It is fetched here, not by Ray before: that is when torch,
                transformers and peft are imported.
        """
        with paused_gc():
            import torch

            from autopeft.engine.executor import Workbench

            context: WorkerContext = ray.get(held[0])
            # All of it stays as long as this process, which is ours.
            gc.freeze()
        if context.device == "cpu":
            # Two threads in a process that shares its cores with another worker are over 20x
            # slower than one each.
            torch.set_num_threads(1)
        silence("transformers")
        self._bench = Workbench(context)
        self._pack: PackRun | None = None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Lays the next job on the bench: the actor, and its model, live on."""
        self._begin(new_config)
        return True

    def _begin(self, config: Mapping[str, Any]) -> None:
        jobs = [Job.from_json(row) for row in json.loads(config[JOBS])]
        self._clear()
        if len(jobs) == 1:
            self._bench.begin(jobs[0])
            return
        from autopeft.engine.job_groups import PackRun

        self._name = config[PACK]
        must_pay = self._bench.context.settings.pack is None
        self._pack = PackRun(self._bench, jobs, must_pay=must_pay)

    def step(self) -> dict[str, Any]:
        """Trains to the next message of each job."""
        if self._pack is None:
            messages: Mapping[int, Message] = {0: self._bench.advance()}
        else:
            self._pack.drop(stops_of(self._name))
            messages = self._pack.advance()
        return {
            # Files are too large for Tune's own results. Tune would take a dict apart.
            MESSAGES: [
                (index, ray.put(message) if isinstance(message, ConfirmMessage) else message)
                for index, message in messages.items()
            ]
        }

    def _clear(self) -> None:
        if self._pack is not None:
            self._pack.close()
            self._pack = None
        self._bench.clear()

    def cleanup(self) -> None:
        """Detaches what is attached."""
        self._clear()
