"""The meter of `energy_joules`: what the devices of a worker take while it trains."""

from __future__ import annotations

from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.training.measuring import Meter
from autopeft.utils.device import ids_of, is_accelerator, is_here
from autopeft.utils.energy import DeviceEnergy, PackageEnergy, no_energy


def open_energy(device: str, n_devices: int) -> Meter:
    """Open the counters of a worker's accelerators, or of the CPU packages where it has none.

    Args:
        device: As torch names it.
        n_devices: Accelerators of the worker.

    Raises:
        SettingsError: if there is no counter, or it may not be read.
    """
    if not is_accelerator(device):
        return PackageEnergy()
    ids = ids_of(device, n_devices)
    if not ids:
        raise no_energy(f"no counter of energy is known for {device}")
    return DeviceEnergy(ids)


def check_energy(settings: SearchSettings, task: Task, device: str) -> None:
    """Check that workers can measure their energy, as far as this machine tells.

    Raises:
        SettingsError: if they cannot.
    """
    shared = settings.gpus_per_worker
    if is_accelerator(device) and shared is not None and shared < 1:
        problem = f"with gpus_per_worker={shared:g}, a device's counter counts several workers"
        raise no_energy(problem, "use gpus_per_worker=1")
    if is_here(device) and settings.ray_address is None:
        open_energy(device, 1)
