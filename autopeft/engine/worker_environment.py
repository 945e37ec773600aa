"""What a worker's process is started with. Knows no ray."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path


def thread_environment() -> dict[str, str]:
    """Environment variables for workers anywhere: one thread each."""
    return {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def worker_environment() -> dict[str, str]:
    """Environment variables for workers of this machine.

    One thread each; and, on Linux, the allocator that Ray brings for its own servers. The system's
    gives the memory of a step's activations back once they are freed, and the next step has to be
    given it anew, page by page. An allocator of the user's own (`LD_PRELOAD`) is left in place.
    """
    variables = thread_environment()
    library = _jemalloc()
    if library is None or os.environ.get("LD_PRELOAD"):
        return variables
    # Large tensors are what a step is made of: treat them as all others, in huge pages.
    jemalloc = {"LD_PRELOAD": str(library), "MALLOC_CONF": "oversize_threshold:0,thp:always"}
    return variables | jemalloc if _starts_with(jemalloc) else variables


def _jemalloc() -> Path | None:
    """Ray's copy of the allocator; None where there is none."""
    ray = importlib.util.find_spec("ray")
    if sys.platform != "linux" or ray is None or ray.origin is None:
        return None
    library = Path(ray.origin).parent / "core" / "libjemalloc.so"
    return library if library.exists() else None


def _starts_with(variables: dict[str, str]) -> bool:
    """Whether a process can start so: one built for other pages than this system's dies at once."""
    tried = subprocess.run(
        [sys.executable, "-S", "-c", ""], env=os.environ | variables, capture_output=True
    )
    return tried.returncode == 0 and not tried.stderr
