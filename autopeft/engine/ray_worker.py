"""The worker actor: lists of jobs come in, messages go out.

Every worker imports this module before its first step, so it imports nothing of the search.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from autopeft.engine.messages import ConfirmMessage, Job, WorkerContext
from autopeft.engine.ray_board import WorkerBoard
from autopeft.utils.gc import paused_gc
from autopeft.utils.quiet import silence
from autopeft.utils.registry import restore
from autopeft.utils.scratch import remove_copy

GROUP = "group"
"""Key of a Tune config: the `JobGroup` to run."""

MESSAGES = "messages"
"""Key of a Tune result: pairs of a job's index in its group and its message."""


@dataclass(frozen=True, repr=False)
class JobGroup:
    """Jobs that one worker runs together: one trial to Tune.

    Tune searches dicts and lists of a config for values to resolve and prints the others into a
    tag; it copies the config five times a trial and sends it back with every result. An object of
    its own passes through untouched, is not copied, and prints as its name, Tune's id of the trial.
    """

    name: str
    jobs: tuple[Job, ...]

    def __repr__(self) -> str:
        return self.name

    def __deepcopy__(self, memo: dict[int, Any]) -> JobGroup:
        return self


class AdapterTrainable(tune.Trainable):  # type: ignore[misc]
    """The worker: one executor for the actor's life, one group of jobs after another on it."""

    def setup(self, config: dict[str, Any], context: tuple[ray.ObjectRef, Any]) -> None:
        """Load the base model, once a worker, and begin the first jobs.

        The context is fetched here, because fetching it imports torch, transformers and peft. With
        it comes what hands out the base model's files, see `ray_files`.
        """
        self._board = WorkerBoard()
        group: JobGroup = config[GROUP]
        self._board.begin(group.name, group.jobs, is_starting=True)
        with paused_gc():
            from autopeft.engine.executors import executor_class
            from autopeft.engine.ray_files import with_model

            fetched: WorkerContext = with_model(ray.get(context[0]), context[1])
            if fetched.carried is not None:
                restore(fetched.carried)
            make_executor = executor_class(fetched)
            # All of this lives as long as this process.
            gc.freeze()
        if fetched.device == "cpu" and (torch := sys.modules.get("torch")) is not None:
            # Two workers with two threads each on two cores are over 20 times slower than with one.
            torch.set_num_threads(1)
        silence("transformers")
        self._cache_folder = fetched.cache_folder
        self._executor = make_executor(fetched, self._board.on_step)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin the next jobs on the model that is loaded already."""
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._group: JobGroup = config[GROUP]
        self._board.begin(self._group.name, self._group.jobs)
        self._executor.begin(self._group.jobs)

    def step(self) -> dict[str, Any]:
        """Train to the next message of each job."""
        if len(self._group.jobs) > 1:
            self._executor.drop(self._board.stopped(self._group.name))
        try:
            messages = self._executor.advance()
        except KeyboardInterrupt as error:
            # Nobody types Ctrl-C here: it comes from the user's code, and Ray would end the search.
            raise RuntimeError("KeyboardInterrupt was raised in a worker") from error
        # Files are too large for Tune's own results, and Tune would flatten a dict.
        return {
            MESSAGES: [
                (index, ray.put(message) if isinstance(message, ConfirmMessage) else message)
                for index, message in messages.items()
            ]
        }

    def cleanup(self) -> None:
        """Detach what is attached; leave no files on this machine."""
        self._board.leave()
        self._executor.clear()
        remove_copy(self._cache_folder)
