from __future__ import annotations

import pytest

from autopeft.costs.memory import CONTEXT_BYTES, usable_bytes
from autopeft.engine.devices import WORKER_BYTES, Devices, devices_here, per_device
from autopeft.utils.hardware import available_memory_bytes


@pytest.mark.parametrize(
    ("count", "share", "workers"),
    [(2, 0.4, 4), (1, 0.3, 3), (3, 0.25, 12), (2, 1.0, 2), (8, 2.0, 4), (1, 2.0, 1), (9, 0.1, 90)],
)
def test_a_share_lies_on_one_device(count: int, share: float, workers: int) -> None:
    assert Devices("cuda", count).workers(share) == workers


def test_room_is_what_a_worker_can_allocate() -> None:
    whole = Devices("cuda", 2, 24 * 10**9)
    assert whole.room(1.0) == usable_bytes(24e9)
    half = whole.room(0.4)
    assert half == usable_bytes(24e9, processes=2)
    assert half is not None
    assert 2 * (half + CONTEXT_BYTES) < 24e9
    driver_too = Devices("cuda", 2, 24 * 10**9, is_shared=True)
    assert (driver_too.room(1.0) or 0.0) < usable_bytes(24e9) - CONTEXT_BYTES / 2
    assert Devices("cuda", 2).room(0.5) is None
    assert Devices(memory_bytes=10**9).room(0.0) == 10**9 - WORKER_BYTES
    assert Devices(memory_bytes=5).room(0.0) == 0.0
    assert per_device(0.0) == 1


def test_several_devices_hold_a_model_whose_blocks_are_not_split() -> None:
    machine = Devices("cuda", 4, 24 * 10**9)
    one, two = machine.room(1.0), machine.room(2.0, block_bytes=1e9)
    assert one is not None
    assert two == 2 * one - 1e9
    assert machine.holding(30e9, block_bytes=1e9) == 2
    assert machine.holding(60e9, block_bytes=1e9) == 3
    assert machine.holding(100e9, block_bytes=1e9) is None
    assert Devices("cuda", 4).holding(1.0, block_bytes=1.0) is None
    cluster = Devices("cuda", 6, 24 * 10**9, of_nodes=(3, 3))
    assert cluster.workers(2.0) == 2
    assert cluster.most_per_worker == 3
    assert cluster.holding(80e9, block_bytes=1e9) is None


def test_without_accelerators_there_are_cores() -> None:
    free = available_memory_bytes()
    assert Devices("cuda", 2, 5).without_accelerators().memory_bytes == pytest.approx(free, rel=0.2)
    assert Devices("cuda", 2, 5, cores=7).without_accelerators() == Devices(cores=7)
    assert devices_here().kind == "cpu"
