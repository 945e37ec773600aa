"""Reads counters of energy: of CPU packages (RAPL) and of NVIDIA's devices (NVML).

Sources: Linux `Documentation/power/powercap/powercap.rst` and `Documentation/filesystems/proc.rst`;
NVML's `nvmlDeviceGetTotalEnergyConsumption`. A process's share of a package's energy is its share
of the CPU time, as in Scaphandre.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopeft.errors import SettingsError

POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows the zones of which it counts the energy."""

PROC = Path("/proc")

NAME = "energy_joules"
"""The cost that needs these counters."""

_REMEDY = "leave energy_joules out; train_flops is known on every machine"


def no_energy(problem: str, remedy: str = _REMEDY) -> SettingsError:
    """Return the error that says why energy cannot be measured."""
    return SettingsError("objectives", NAME, problem, remedy)


@dataclass
class _Zone:
    """A package: its file, the largest count before it wraps around, and the last count."""

    file: Path
    largest: int
    last: int

    def risen(self) -> int:
        """Return the microjoules since the last call."""
        now = _count(self.file)
        risen = now - self.last
        if risen < 0:  # It began again at 0.
            risen += self.largest
        self.last = now
        return risen


class PackageEnergy:
    """The energy of this machine's CPU packages since now, as far as it is this process's.

    The process has the share of the energy that it has of the machine's CPU time, at each reading.
    A counter wraps around after some minutes at full power, so it must be read more often.

    Args:
        powercap: Where Linux shows its zones.
        proc: Where it shows CPU times.
        own_seconds: Returns the CPU seconds of this process.

    Raises:
        SettingsError: if there is no package, or its counter cannot be read.
    """

    def __init__(
        self,
        powercap: Path = POWERCAP,
        proc: Path = PROC,
        own_seconds: Callable[[], float] = time.process_time,
    ) -> None:
        self._proc = proc
        self._own_seconds = own_seconds
        self._lock = threading.Lock()
        self._joules = 0.0
        self._zones = [_opened(zone) for zone in _packages(powercap)]
        if not self._zones:
            raise no_energy(f"{powercap} has no package of a CPU (RAPL) on this machine")
        self._own, self._busy = own_seconds(), self._busy_seconds()

    def __call__(self) -> float:
        """Return the joules since the start."""
        with self._lock:
            joules = sum(zone.risen() for zone in self._zones) / 1e6
            own, busy = self._own_seconds(), self._busy_seconds()
            spent, of = own - self._own, busy - self._busy
            # The machine's times are in hundredths of a second.
            share = min(1.0, spent / of) if of > 0 else 1.0
            self._own, self._busy = own, busy
            self._joules += share * joules
            return self._joules

    def _busy_seconds(self) -> float:
        """Return the CPU seconds of all processes, of this machine's first line of CPU times."""
        try:
            first = (self._proc / "stat").read_text().split("\n", 1)[0].split()
            user, nice, system, _, _, irq, soft, steal = map(int, first[1:9])
        except (OSError, ValueError) as error:
            raise no_energy(f"{self._proc / 'stat'} has no CPU times ({error})") from None
        return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def _packages(powercap: Path) -> Sequence[Path]:
    """Return the zones that are packages: not their parts, and not the platform around them.

    `intel-rapl-mmio` counts the same package once more.
    """
    zones = sorted(powercap.glob("intel-rapl:*"))
    return [zone for zone in zones if _text(zone / "name").startswith("package")]


def _opened(zone: Path) -> _Zone:
    file = zone / "energy_uj"
    return _Zone(file, _count(zone / "max_energy_range_uj"), _count(file))


def _count(file: Path) -> int:
    try:
        return int(file.read_text())
    except PermissionError:
        problem = f"{file} may not be read by this user"
        raise no_energy(problem, f"allow it: sudo chmod a+r {file}; or {_REMEDY}") from None
    except (OSError, ValueError) as error:
        raise no_energy(f"{file} cannot be read ({error})") from None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


class DeviceEnergy:
    """The energy of some of NVIDIA's devices since their driver was loaded.

    Args:
        ids: Each device's id, as `nvidia-smi -L` shows it.
        nvml: The module `pynvml`; None: it is imported.

    Raises:
        SettingsError: if the module is missing, or a device has no counter.
    """

    def __init__(self, ids: Sequence[str], nvml: Any = None) -> None:
        try:
            self._nvml = nvml or importlib.import_module("pynvml")
        except ImportError:
            problem = "nvidia-ml-py is not installed"
            raise no_energy(problem, 'run: pip install "autopeft[energy]"') from None
        try:
            self._nvml.nvmlInit()
            self._devices = [self._nvml.nvmlDeviceGetHandleByUUID(each) for each in ids]
            self()
        except self._nvml.NVMLError as error:
            raise no_energy(f"NVML counts no energy of {', '.join(ids)} ({error})") from None

    def __call__(self) -> float:
        """Return the joules."""
        read = self._nvml.nvmlDeviceGetTotalEnergyConsumption
        return float(sum(read(device) for device in self._devices)) / 1000
