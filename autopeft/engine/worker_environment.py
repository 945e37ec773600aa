"""The environment variables of worker processes. Imports no ray."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path


def thread_environment() -> dict[str, str]:
    """Return the environment variables of workers on any machine: one thread each."""
    return {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def worker_environment() -> dict[str, str]:
    """Return the environment variables of workers on this machine.

    They have one thread each and, on Linux, use the jemalloc that Ray ships for its own servers:
    the system's allocator returns the memory of freed activations, and the next step pays for
    mapping it again, page by page. A `LD_PRELOAD` of the user's is left alone.
    """
    variables = thread_environment()
    library = _jemalloc()
    if library is None or os.environ.get("LD_PRELOAD"):
        return variables
    # A step allocates large tensors: keep them in the common arenas, on huge pages.
    jemalloc = {"LD_PRELOAD": str(library), "MALLOC_CONF": "oversize_threshold:0,thp:always"}
    return variables | jemalloc if _starts_with(jemalloc) else variables


def _jemalloc() -> Path | None:
    """Return the path of Ray's jemalloc; None if it has none."""
    ray = importlib.util.find_spec("ray")
    if sys.platform != "linux" or ray is None or ray.origin is None:
        return None
    library = Path(ray.origin).parent / "core" / "libjemalloc.so"
    return library if library.exists() else None


def _starts_with(variables: dict[str, str]) -> bool:
    """Return whether a process can start: a jemalloc built for another page size kills it."""
    tried = subprocess.run(
        [sys.executable, "-S", "-c", ""], env=os.environ | variables, capture_output=True
    )
    return tried.returncode == 0 and not tried.stderr
