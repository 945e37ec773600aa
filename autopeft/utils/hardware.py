"""What this machine has: cores that compute, memory, GPUs, matrix-multiply speed."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

GAIN = 1.05
"""Twice the threads must compute at least so much more, or they share the same cores."""


def n_cores() -> int:
    """Cores this process may use (a container's share, not the host's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def feeding_cores(limit: int | None = None, measure: Callable[[int], float] | None = None) -> int:
    """Cores that compute at the same time, found by trying: a quota or a shared core shows.

    Doubles the number of threads that multiply matrices, one thread each, as long as together they
    compute more.

    Args:
        limit: Most that can be of use; default: `n_cores()`.
        measure: Number of threads -> work a second; default: `threads_flops_per_second`.
    """
    measure = measure or threads_flops_per_second
    limit = n_cores() if limit is None else limit
    feeding, speed = 1, measure(1)
    while feeding < limit:
        more = min(limit, 2 * feeding)
        faster = measure(more)
        # A neighbor may have been busy just then: only what shows twice is believed.
        if faster < GAIN * speed and (faster := measure(more)) < GAIN * measure(feeding):
            return feeding
        feeding, speed = more, faster
    return feeding


def threads_flops_per_second(n_threads: int, *, size: int = 512, seconds: float = 0.15) -> float:
    """Speed of so many threads together, each multiplying matrices of its own on one core."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    done = [0] * n_threads
    try:
        until = time.perf_counter() + seconds

        def work(index: int) -> None:
            torch.set_num_threads(1)
            left = torch.ones(size, size)
            out = torch.empty(size, size)
            while time.perf_counter() < until:
                torch.mm(left, left, out=out)
                done[index] += 1

        threads = [threading.Thread(target=work, args=(i,)) for i in range(n_threads)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(done) * 2.0 * size**3 / (time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)


def available_memory_bytes(root: Path = Path("/")) -> int | None:
    """Memory that can be taken now, a container's limit included; None where nobody tells."""
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
    """Lines of a name and a number, such as "MemAvailable:  1234 kB"."""
    try:
        rows = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def n_gpus() -> int:
    """CUDA GPUs that torch sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def matmul_flops_per_second(
    device: str, *, size: int = 768, seconds: float = 0.2, dtype: str = "float32"
) -> float:
    """Best measured speed of a square matrix multiply: what no training step can beat.

    Args:
        device: "cpu" (one thread, as a worker has) or "cuda".
        size: Side of the matrices.
        seconds: How long to measure.
        dtype: Of the numbers, e.g. "float32" or "bfloat16".
    """
    import torch

    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        left = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
        best = 0.0
        until = time.perf_counter() + seconds
        # The first products pay for libraries being loaded and pages being mapped.
        for n in itertools.count():
            if n >= 8 and time.perf_counter() > until:
                break
            began = time.perf_counter()
            product = left @ left
            float(product[0, 0])  # waits for a GPU
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
        return best
    finally:
        torch.set_num_threads(threads)
