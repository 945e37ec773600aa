"""Finds the devices of a search, and how many workers they serve."""

from __future__ import annotations

from autopeft.costs import PriceTable
from autopeft.engine.devices import WORKER_BYTES, Devices, devices_here, per_device
from autopeft.errors import SettingsError
from autopeft.preparing.notes import Note
from autopeft.searcher.space.space import SearchSpace
from autopeft.settings import SearchSettings
from autopeft.utils.hardware import n_cores, n_parallel_cores


def find_devices(ray_address: str | None) -> Devices:
    """Return the devices of a Ray cluster, or of this machine without an address.

    Raises:
        SettingsError: if no cluster answers, or its accelerators cannot be used.
    """
    if ray_address is None:
        return devices_here()
    from autopeft.engine.ray_devices import cluster_devices

    return cluster_devices(ray_address)


def devices_of(settings: SearchSettings) -> tuple[Devices, float]:
    """Return the workers' devices, and the share of one that a worker has."""
    found, wanted = find_devices(settings.ray_address), settings.gpus_per_worker
    if wanted and not found.count:
        where = "there" if settings.ray_address is not None else "here"
        problem = f"no accelerator is seen {where}"
        raise SettingsError("gpus_per_worker", wanted, problem, "leave it out")
    if wanted and wanted > found.most_per_worker:
        problem = f"a machine has {found.most_per_worker}"
        raise SettingsError(
            "gpus_per_worker", wanted, problem, f"use at most {found.most_per_worker}"
        )
    if wanted == 0:
        found = found.without_accelerators()
    return found, (wanted or 1.0) if found.count else 0.0


def workers_of(
    devices: Devices, share: float, prices: PriceTable, space: SearchSpace, note: Note
) -> tuple[int, float]:
    """Return how many workers devices, or cores and memory, can serve, and a worker's share."""
    peak = max((prices.price(c).peak_memory_bytes for c in space.baselines()), default=0)
    if devices.count:
        wanted = per_device(share)
        fitting = wanted
        while fitting > 1 and (room := devices.room(1 / fitting)) is not None and room < peak:
            fitting -= 1
        if fitting < wanted:
            note(f"memory of a device is free for {fitting} of {wanted} workers")
            share = 1 / fitting
        return devices.workers(share), share
    if devices.cores is not None:
        return devices.cores, 0.0
    feeding, memory = n_parallel_cores(), devices.memory_bytes
    if memory is not None:
        fitting = max(1, int(memory // (WORKER_BYTES + peak)))
        if fitting < feeding:
            note(f"memory is free for {fitting} workers, cores for {feeding}")
        feeding = min(feeding, fitting)
    if feeding < n_cores():
        workers = "1 worker" if feeding == 1 else f"{feeding} workers"
        note(f"{workers} on {n_cores()} cores; --workers overrides")
    return feeding, 0.0
