"""The devices of a Ray cluster, and a function run on one of its workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from autopeft.costs import PriceTable
from autopeft.engine.devices import Devices, devices_here
from autopeft.engine.messages import WorkerContext
from autopeft.engine.ray_backend import join, log_of_driver, ray, start_for
from autopeft.engine.ray_exit import ExitNotice
from autopeft.engine.ray_files import offer, with_model
from autopeft.engine.ray_nodes import accelerator_types, alive, gpus_of
from autopeft.engine.search_plan import Speed
from autopeft.engine.speed import measure_speed
from autopeft.errors import SettingsError, TrainingFailure
from autopeft.plan import Candidate
from autopeft.training.precision import Precision
from autopeft.utils.device import DEFAULT
from autopeft.utils.formatting import one_line
from autopeft.utils.registry import restore
from autopeft.utils.scratch import scratch_folder

T = TypeVar("T")

_SECONDS = 120.0
"""How long a free worker is waited for."""

_LITTLE = 0.001
"""The share of a GPU with which Ray lets a worker see one."""


def cluster_devices(address: str) -> Devices:
    """Return what a cluster has; a worker beside a GPU says what torch sees there.

    Raises:
        SettingsError: if no cluster answers, or torch sees no accelerator on its GPU nodes.
    """
    with connected(address):
        nodes = alive()
        cores = max(1, sum(int(node.get("CPU", 0)) for node in nodes))
        of_nodes = gpus_of(nodes)
        if not of_nodes:
            return Devices(cores=cores)
        count, found = sum(of_nodes), []
        # Ray names the types of some accelerators; the smallest memory counts.
        for kind in accelerator_types(nodes) or (None,):
            try:
                seen = on_worker(address, _LITTLE, devices_here, of_type=kind)
            except TrainingFailure:
                continue  # All are busy.
            found.append(seen)
    if not found:
        # The kind is a guess.
        return Devices(DEFAULT, count, None, cores, of_nodes=of_nodes)
    seen = min(found, key=lambda each: each.memory_bytes or math.inf)
    if not seen.count:
        problem = f"torch sees none of the cluster's {count} GPUs on the node that has one"
        remedy = "install a torch built for them there, or use gpus_per_worker=0"
        raise SettingsError("ray_address", address, problem, remedy)
    return Devices(seen.kind, count, seen.memory_bytes, cores, of_nodes=of_nodes)


def on_worker(
    address: str, gpus: float, function: Callable[..., T], *args: Any, of_type: str | None = None
) -> T:
    """Run a function on a worker of a cluster with a share of a GPU, perhaps of one type.

    Raises:
        TrainingFailure: if it fails there, or no worker is free.
    """
    with connected(address):
        return _on_free_worker(gpus, function, *args, of_type=of_type)


def _on_free_worker(
    gpus: float, function: Callable[..., T], *args: Any, of_type: str | None = None
) -> T:
    """Run a function as `on_worker` does, in the Ray that this process has joined."""
    kinds = {of_type: _LITTLE} if of_type else None
    remote = ray.remote(num_cpus=1, num_gpus=gpus, resources=kinds, max_retries=0)(function)
    task = remote.remote(*args)
    try:
        found: T = ray.get(task, timeout=_SECONDS)
    except ray.exceptions.GetTimeoutError as error:
        ray.cancel(task, force=True)
        raise TrainingFailure(f"no worker was free for {_SECONDS:.0f} s") from error
    except ray.exceptions.RayError as error:
        raise TrainingFailure(one_line(error)[-400:]) from error
    return found


def speed_there(
    address: str | None,
    gpus: float,
    context: WorkerContext,
    measured: Candidate,
    average: Sequence[Candidate],
    prices: PriceTable,
    options: Mapping[str, Any],
) -> tuple[Speed, float, Precision]:
    """Measure the speed, as `measure_speed` does, on a worker of a cluster, or of this machine.

    Raises:
        TrainingFailure: if it fails there, or no worker is free.
    """
    given = (context, measured, average, prices, options)
    if address is not None:
        with connected(address):
            return _on_free_worker(gpus, _speed, offer(context), *given)
    with _noticed(not ray.is_initialized(), lambda: start_for(context)):
        return _on_free_worker(gpus, _speed, None, *given)


def _speed(
    files: Any,
    context: WorkerContext,
    measured: Candidate,
    average: Sequence[Candidate],
    prices: PriceTable,
    options: Mapping[str, Any],
) -> tuple[Speed, float, Precision]:
    if context.carried is not None:
        restore(context.carried)
    with scratch_folder() as folder:
        context = with_model(replace(context, cache_folder=str(folder)), files)
        context = replace(context, cache_folder=None)
        return measure_speed(context, measured, average, prices, **options)


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Join a cluster, unless this process has joined one.

    Raises:
        SettingsError: if no cluster answers at the address.
    """
    with _noticed(not ray.is_initialized(), lambda: join(address)):
        yield


@contextmanager
def _noticed(is_ours: bool, start: Callable[[], None]) -> Iterator[None]:
    """Start Ray for the block, unless it runs."""
    if not is_ours:
        yield
        return
    with ExitNotice(None) as notice:
        start()
        try:
            if (log := log_of_driver()) is not None:
                notice.read(log)
            yield
        finally:
            ray.shutdown()
