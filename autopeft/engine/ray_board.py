"""A board beside Tune: which jobs of a group are to stop, and how far jobs are.

Tune can only stop a group as a whole, and a worker that gives Tune a result waits for its answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import ray

from autopeft.engine.messages import OnStep, StepMessage

_NAME = "autopeft-board"


@ray.remote(num_cpus=0)
class _Board:
    def __init__(self) -> None:
        self._stopped: dict[str, set[int]] = {}
        self._steps: dict[tuple[str, str, int], StepMessage] = {}

    def stop(self, group: str, indices: list[int]) -> None:
        self._stopped.setdefault(group, set()).update(indices)

    def stopped(self, group: str) -> set[int]:
        return self._stopped.get(group, set())

    def tell(self, step: StepMessage) -> None:
        self._steps[step.job] = step

    def take(self) -> list[StepMessage]:
        taken, self._steps = list(self._steps.values()), {}
        return taken


class DriverBoard:
    """The board, on the driver; it lives as long as this does."""

    def __init__(self) -> None:
        self._actor: Any = _Board.options(name=_NAME, get_if_exists=True).remote()  # type: ignore[attr-defined]
        self._asked: Any = None

    def stop(self, group: str, indices: Iterable[int]) -> None:
        """Stop these jobs of a group before the worker's next message."""
        ray.get(self._actor.stop.remote(group, list(indices)))

    def steps(self) -> list[StepMessage]:
        """Return what workers told before the last call; never wait for it."""
        told: list[StepMessage] = []
        if self._asked is not None:
            if not ray.wait([self._asked], timeout=0)[0]:
                return told
            with suppress(ray.exceptions.RayError):  # A board that died ends no search.
                told = ray.get(self._asked)
        self._asked = self._actor.take.remote()
        return told


class WorkerBoard:
    """The board, in a worker."""

    def __init__(self) -> None:
        self._actor = ray.get_actor(_NAME)

    def stopped(self, group: str) -> set[int]:
        """Return the jobs of a group that are to stop."""
        found: set[int] = ray.get(self._actor.stopped.remote(group))
        return found

    @property
    def on_step(self) -> OnStep:
        """Tells the driver how far a job is, without waiting."""
        return self._actor.tell.remote  # type: ignore[no-any-return]
