"""Energy of CPU packages from a tree as Linux shows it, and of devices from a stand-in for NVML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from autopeft.errors import SettingsError
from autopeft.utils.energy import DeviceEnergy, PackageEnergy

TICKS = os.sysconf("SC_CLK_TCK")


class Machine:
    """A tree with two packages, one of them counted twice, and CPU times."""

    def __init__(self, root: Path) -> None:
        self.powercap, self.proc = root / "powercap", root / "proc"
        self.own = 0.0
        self.proc.mkdir()
        for zone, name in {
            "intel-rapl:0": "package-0",
            "intel-rapl:0:0": "dram",
            "intel-rapl:1": "package-1",
            "intel-rapl:2": "psys",
            "intel-rapl-mmio:0": "package-0",
        }.items():
            (self.powercap / zone).mkdir(parents=True)
            (self.powercap / zone / "name").write_text(f"{name}\n")
            (self.powercap / zone / "max_energy_range_uj").write_text("262000000\n")
            self.count(zone, 0.0)
        self.busy(0.0)

    def count(self, zone: str, joules: float) -> None:
        (self.powercap / zone / "energy_uj").write_text(f"{round(1e6 * joules)}\n")

    def busy(self, seconds: float) -> None:
        ticks = round(seconds * TICKS)
        idle = 10**6  # Not counted, as is the time that waits for disks.
        (self.proc / "stat").write_text(f"cpu  {ticks} 0 0 {idle} {idle} 0 0 0 0 0\ncpu0 1\n")

    def open(self) -> PackageEnergy:
        return PackageEnergy(self.powercap, self.proc, lambda: self.own)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_energy_of_all_packages_counts_once(machine: Machine) -> None:
    meter = machine.open()
    assert meter() == 0.0
    for zone in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
        machine.count(zone, 30.0)
    machine.count("intel-rapl:1", 12.0)
    machine.own = 4.0
    machine.busy(4.0)
    assert meter() == pytest.approx(42.0)


def test_a_counter_that_wrapped_around_goes_on(machine: Machine) -> None:
    machine.count("intel-rapl:0", 260.0)
    meter = machine.open()
    machine.own = 1.0
    machine.busy(1.0)
    machine.count("intel-rapl:0", 3.0)
    assert meter() == pytest.approx(5.0)
    machine.count("intel-rapl:0", 4.0)
    assert meter() == pytest.approx(6.0)


def test_a_process_has_its_share_of_the_machines_time(machine: Machine) -> None:
    meter = machine.open()
    machine.count("intel-rapl:0", 40.0)
    machine.own = 1.0
    machine.busy(4.0)
    assert meter() == pytest.approx(10.0)
    machine.count("intel-rapl:0", 50.0)
    machine.own = 3.0  # As coarse as the machine's times are, it cannot have more than all.
    machine.busy(5.0)
    assert meter() == pytest.approx(20.0)


def _refused(machine: Machine) -> str:
    with pytest.raises(SettingsError) as caught:
        machine.open()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("objectives='energy_joules': ")
    return str(caught.value)


def test_a_machine_without_packages_is_refused(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.powercap = tmp_path / "none"
    assert "has no package of a CPU (RAPL)" in _refused(machine)


def test_a_counter_that_may_not_be_read_is_named(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_text

    def refuse(path: Path, *given: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path, *given)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert "sudo chmod a+r" in _refused(machine)


@pytest.mark.parametrize("text", ["", "much"])
def test_a_counter_that_is_no_number_is_named(machine: Machine, text: str) -> None:
    (machine.powercap / "intel-rapl:1/energy_uj").write_text(text)
    assert "intel-rapl:1/energy_uj cannot be read" in _refused(machine)


def test_a_machine_without_cpu_times_is_refused(machine: Machine) -> None:
    (machine.proc / "stat").write_text("cpu\n")
    assert "has no CPU times" in _refused(machine)


class Nvml:
    """What is used of pynvml."""

    class NVMLError(Exception):
        """Its error."""

    def __init__(self, **millijoules: int) -> None:
        self.counts = {name.replace("_", "-"): count for name, count in millijoules.items()}

    def nvmlInit(self) -> None:
        """Nothing to begin."""

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.counts:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return self.counts[handle]


def test_the_energy_of_devices_is_their_sum() -> None:
    nvml = Nvml(GPU_a=1000, GPU_b=500, GPU_c=7)
    meter = DeviceEnergy(["GPU-a", "GPU-b"], nvml)
    before = meter()
    nvml.counts["GPU-a"] += 2500
    nvml.counts["GPU-c"] += 9
    assert meter() - before == pytest.approx(2.5)


def test_a_device_without_a_counter_is_refused() -> None:
    with pytest.raises(SettingsError, match="NVML counts no energy of GPU-x"):
        DeviceEnergy(["GPU-x"], Nvml(GPU_a=1))
