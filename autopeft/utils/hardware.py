"""This machine's usable cores, free memory, and matrix-multiply speed."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

GAIN = 1.05
"""Speedup below which twice the threads are taken to share the same cores."""


def n_cores() -> int:
    """Return the number of cores this process may use (a container's share, not the host's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def n_parallel_cores(
    limit: int | None = None, measure: Callable[[int], float] | None = None
) -> int:
    """Measure how many cores compute at the same time, quotas and shared cores included.

    Doubles the number of threads that multiply matrices, up to the limit, for as long as the total
    speed grows; `measure` returns it for a number of threads.
    """
    measure = measure or threads_flops_per_second
    limit = n_cores() if limit is None else limit
    feeding, speed = 1, measure(1)
    while feeding < limit:
        more = min(limit, 2 * feeding)
        faster = measure(more)
        # Another process may have been busy just then, so measure twice before giving up.
        if faster < GAIN * speed and (faster := measure(more)) < GAIN * measure(feeding):
            return feeding
        feeding, speed = more, faster
    return feeding


def threads_flops_per_second(n_threads: int, *, size: int = 512, seconds: float = 0.15) -> float:
    """Return the total FLOPs a second of `n_threads` threads that each multiply matrices."""
    import torch

    done = [0] * n_threads

    def work(index: int) -> None:
        torch.set_num_threads(1)
        left = torch.ones(size, size)
        out = torch.empty(size, size)
        while time.perf_counter() < until:
            torch.mm(left, left, out=out)
            done[index] += 1

    with one_thread("cpu"):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(n_threads)]
        began = time.perf_counter()
        until = began + seconds
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(done) * 2.0 * size**3 / (time.perf_counter() - began)


@contextmanager
def one_thread(device: str) -> Iterator[None]:
    """Let torch compute with one thread on a CPU, as Ray's workers do; restore it on exit."""
    import torch

    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_memory_bytes(root: Path = Path("/")) -> int | None:
    """Return the free memory, a container's limit included; None where it is unknown."""
    free: list[int] = []
    information = _numbers(root / "proc/meminfo")
    if "MemAvailable" in information:
        free.append(1024 * information["MemAvailable"])
    group = root / "sys/fs/cgroup"
    limit, used = _number(group / "memory.max"), _number(group / "memory.current")
    if limit is not None and used is not None:
        free.append(limit - used + _numbers(group / "memory.stat").get("inactive_file", 0))
    return max(0, min(free)) if free else None


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _numbers(path: Path) -> Mapping[str, int]:
    """Read lines of a name and a number, such as "MemAvailable:  1234 kB"."""
    try:
        rows = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def matmul_flops_per_second(
    device: str, *, size: int = 768, seconds: float = 0.2, dtype: str = "float32"
) -> float:
    """Measure the best speed of a square matrix multiply, an upper bound for training steps.

    On a CPU it has one thread, as a worker has.
    """
    import torch

    with one_thread(device):
        left = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
        best = 0.0
        until = time.perf_counter() + seconds
        # The first products also load libraries and map pages.
        for n in itertools.count():
            if n >= 8 and time.perf_counter() > until:
                break
            began = time.perf_counter()
            product = left @ left
            float(product[0, 0])  # wait for a GPU
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
        return best
