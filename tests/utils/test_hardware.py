from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autopeft.utils.hardware import (
    available_memory_bytes,
    n_cores,
    n_parallel_cores,
    threads_flops_per_second,
)


def quota(cores: int) -> Callable[[int], float]:
    """A machine on which so many threads compute at once, whatever its number of cores says."""
    return lambda threads: 10.0 * min(threads, cores)


@pytest.mark.parametrize(
    ("cores", "limit", "expected"),
    [(1, 8, 1), (2, 16, 2), (4, 16, 4), (3, 16, 4), (16, 16, 16), (64, 6, 6), (8, 1, 1)],
)
def test_threads_are_added_while_they_compute_more(cores: int, limit: int, expected: int) -> None:
    assert n_parallel_cores(limit, quota(cores)) == expected


def test_one_slow_measurement_is_not_believed() -> None:
    slow = iter([True, False, False, False, False, False])

    def measure(threads: int) -> float:
        return 10.0 if threads == 2 and next(slow) else 10.0 * min(threads, 2)

    assert n_parallel_cores(2, measure) == 2


def test_the_machine_itself() -> None:
    before = torch.get_num_threads()
    assert 1 <= n_parallel_cores() <= n_cores()
    assert threads_flops_per_second(1, seconds=0.02) > 0
    assert torch.get_num_threads() == before
    memory = available_memory_bytes()
    assert memory is None or memory > 2**20


def test_the_smaller_of_machine_and_container_counts(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert available_memory_bytes(tmp_path) == 4000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000\n")
    assert available_memory_bytes(tmp_path) == 4000 * 1024
    (group / "memory.max").write_text("5000\n")
    assert available_memory_bytes(tmp_path) == 4000
    (group / "memory.stat").write_text("anon 10\ninactive_file 500\n")
    assert available_memory_bytes(tmp_path) == 4500
