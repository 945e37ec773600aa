"""Which jobs of a pack must stop: Tune can only stop a pack as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ray

_NAME = "autopeft-stops"


@ray.remote(num_cpus=0)
class _Stops:
    """Heard by all workers."""

    def __init__(self) -> None:
        self._stopped: dict[str, set[int]] = {}

    def add(self, pack: str, indices: list[int]) -> None:
        """These must stop."""
        self._stopped.setdefault(pack, set()).update(indices)

    def of(self, pack: str) -> set[int]:
        """Those told so far."""
        return self._stopped.get(pack, set())


def hold_stops() -> Any:
    """The actor, which lives as long as something refers to it."""
    return _Stops.options(name=_NAME, get_if_exists=True).remote()  # type: ignore[attr-defined]


def call_stops(pack: str, indices: Iterable[int]) -> None:
    """Returns once the word is there, before the worker's next step begins."""
    ray.get(ray.get_actor(_NAME).add.remote(pack, list(indices)))


def stops_of(pack: str) -> set[int]:
    """Places, in a pack, of the jobs that must stop."""
    stopped: set[int] = ray.get(ray.get_actor(_NAME).of.remote(pack))
    return stopped
