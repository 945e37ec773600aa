"""A board beside Tune: which jobs of a group are to stop, how far jobs are, and who is alive.

Tune can only stop a group as a whole, and a worker that gives Tune a result waits for its answer.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from autopeft.engine.messages import BeatMessage, Job, OnStep, StepMessage
from autopeft.training.step_clock import TELL_EVERY

_NAME = "autopeft-board"


@dataclass(frozen=True)
class Beat:
    """A worker's sign of life, and where its process is."""

    group: str
    message: BeatMessage
    node: str
    pid: int


@dataclass(frozen=True)
class Told:
    """What workers told since the last time."""

    steps: tuple[StepMessage, ...] = ()
    beats: tuple[Beat, ...] = field(default=())


@ray.remote(num_cpus=0)
class _Board:
    def __init__(self) -> None:
        self._stopped: dict[str, set[int]] = {}
        self._steps: dict[tuple[str, str, int], StepMessage] = {}
        self._beats: dict[str, Beat] = {}

    def stop(self, group: str, indices: list[int]) -> None:
        self._stopped.setdefault(group, set()).update(indices)

    def stopped(self, group: str) -> set[int]:
        return self._stopped.get(group, set())

    def tell(self, step: StepMessage) -> None:
        self._steps[step.job] = step

    def beat(self, beat: Beat) -> None:
        self._beats[beat.group] = beat

    def take(self) -> Told:
        told = Told(tuple(self._steps.values()), tuple(self._beats.values()))
        self._steps, self._beats = {}, {}
        return told


class DriverBoard:
    """The board, on the driver; it lives as long as this does."""

    def __init__(self) -> None:
        self._actor: Any = _Board.options(name=_NAME, get_if_exists=True).remote()  # type: ignore[attr-defined]
        self._asked: Any = None

    def stop(self, group: str, indices: Iterable[int]) -> None:
        """Stop these jobs of a group before the worker's next message."""
        ray.get(self._actor.stop.remote(group, list(indices)))

    def take(self) -> Told:
        """Return what workers told before the last call; never wait for it."""
        told = Told()
        if self._asked is not None:
            if not ray.wait([self._asked], timeout=0)[0]:
                return told
            with suppress(ray.exceptions.RayError):  # A board that died ends no search.
                told = ray.get(self._asked)
        self._asked = self._actor.take.remote()
        return told


class WorkerBoard:
    """The board, in a worker; a thread tells it every two seconds that the process lives."""

    def __init__(self) -> None:
        self._actor = ray.get_actor(_NAME)
        self._node = ray.get_runtime_context().get_node_id()
        self._group, self._jobs = "", tuple[tuple[str, str, int], ...]()
        self._is_starting = True
        self._is_left = threading.Event()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def begin(self, group: str, jobs: Iterable[Job], *, is_starting: bool = False) -> None:
        """Tell which jobs the worker runs from now on."""
        self._group, self._jobs = group, tuple(job.key for job in jobs)
        self._is_starting = is_starting
        self._tell()

    def leave(self) -> None:
        """Tell nothing more."""
        self._is_left.set()

    def _beat(self) -> None:
        while not self._is_left.wait(TELL_EVERY):
            self._tell()

    def _tell(self) -> None:
        message = BeatMessage(self._jobs, time.process_time(), self._is_starting)
        with suppress(Exception):  # One beat less says nothing; a thread that ended would.
            self._actor.beat.remote(Beat(self._group, message, self._node, os.getpid()))

    def stopped(self, group: str) -> set[int]:
        """Return the jobs of a group that are to stop."""
        found: set[int] = ray.get(self._actor.stopped.remote(group))
        return found

    @property
    def on_step(self) -> OnStep:
        """Tells the driver how far a job is, without waiting."""
        return self._actor.tell.remote  # type: ignore[no-any-return]


@ray.remote(num_cpus=0)  # type: ignore[untyped-decorator]
def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_worker(beat: Beat) -> None:
    """End a worker's process, wherever it is; one that is stopped does not obey Ray."""
    if beat.node == ray.get_runtime_context().get_node_id():
        with suppress(ProcessLookupError):
            os.kill(beat.pid, signal.SIGKILL)
        return
    there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
    _kill.options(scheduling_strategy=there).remote(beat.pid)
