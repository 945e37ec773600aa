"""Benchmarks of `examples/`, run in their quick mode."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


def quick(name: str, tmp_path: Path, *arguments: str) -> str:
    """Return what a benchmark prints in its quick mode."""
    done = subprocess.run(
        [sys.executable, str(_BENCHMARKS / name), "--quick", *arguments],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
