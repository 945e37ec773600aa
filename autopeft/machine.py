"""What this machine has: cores, GPUs, matrix-multiply speed."""

from __future__ import annotations

import itertools
import os
import time


def n_cores() -> int:
    """Cores this process may use (a container's share, not the host's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
