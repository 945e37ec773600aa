"""Measured costs on a worker: after a training, and by meters read around its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from autopeft.costs.objectives import COSTS, Cost
from autopeft.errors import UserError
from autopeft.models.attach import Attached
from autopeft.plan import Candidate
from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.tasks.data import TaskData
from autopeft.training.precision import Precision
from autopeft.utils.registry import blamed
from autopeft.utils.timer import Timer

READ_EVERY = 30.0
"""Seconds between two readings of a meter in a long training: counters wrap around, that of a CPU's
energy after some minutes at full power."""

Meter = Callable[[], float]
"""Reads a counter that rises."""


@dataclass(frozen=True)
class Trained:
    """A trained candidate on its worker: what the function of a measured cost gets.

    Attributes:
        attached: The candidate, with its adapters in the model.
        data: The encoded splits.
        task: The task.
        settings: All settings of the search.
        device: As torch names it.
        precision: Precision in which users run the adapter.
        seconds: How long its steps took.

    Example:
        >>> def n_modules(trained):
        ...     return float(len(trained.attached.placed))
        >>> autopeft.register_cost(autopeft.Cost("n_modules", measure=n_modules)).name
        'n_modules'
    """

    attached: Attached
    data: TaskData
    task: Task
    settings: SearchSettings
    device: str
    precision: Precision
    seconds: float

    @property
    def model(self) -> torch.nn.Module:
        """The model with the adapters."""
        return self.attached.model

    @property
    def candidate(self) -> Candidate:
        """Plan and train settings."""
        return self.attached.candidate


def train_seconds(trained: Trained) -> float:
    """Return the seconds of a training's steps."""
    return trained.seconds


def measure_costs(names: Iterable[str], trained: Trained) -> dict[str, float]:
    """Measure those of these costs that are measured after a training.

    Raises:
        SettingsError: if a function fails, or returns no number of at least 0.
    """
    measured = {}
    for cost in (COSTS[name] for name in names if name in COSTS):
        if cost.measure is not None:
            with blamed("cost", cost.name, "measuring it fails", passing=(torch.OutOfMemoryError,)):
                value = cost.part("measure")(trained)
                measured[cost.name] = cost.checked(value, trained.candidate.digest)
    return measured


def open_meters(needed: Iterable[str], device: str, n_devices: int) -> dict[str, Meter]:
    """Open the meters of costs that a worker's devices have.

    Args:
        needed: Names of the objectives, and of what has a limit; the meters of these must be there.
        device: As torch names it.
        n_devices: Devices of the worker.

    Raises:
        UserError: if one that is needed has no meter here.
    """
    opened, asked = {}, set(needed)
    for name in dict.fromkeys((*COSTS.registered, *asked)):
        cost = COSTS.get(name)
        if cost is None or cost.meter is None:
            continue
        try:
            opened[name] = _opened(cost, device, n_devices)
        except UserError:
            if name in asked:
                raise
    return opened


def _opened(cost: Cost, device: str, n_devices: int) -> Meter:
    with blamed("cost", cost.name, "its meter cannot be opened"):
        meter: Meter = cost.part("meter")(device, n_devices)
    return meter


class Metering:
    """Reads meters around the steps of trainings.

    Args:
        meters: Name of a cost -> its meter.

    Attributes:
        risen: By how much each has risen within `running`.
    """

    def __init__(self, meters: Mapping[str, Meter]) -> None:
        self._meters = dict(meters)
        self.risen = dict.fromkeys(meters, 0.0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what the meters tell in this context."""
        before = {name: meter() for name, meter in self._meters.items()}
        with ExitStack() as stack:
            if self._meters:
                stack.enter_context(Timer(self._read, READ_EVERY))
            try:
                yield
            finally:
                for name, meter in self._meters.items():
                    self.risen[name] += meter() - before[name]

    def _read(self) -> None:
        for meter in self._meters.values():
            meter()
