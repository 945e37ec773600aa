"""The benchmark of the search's own time per message, in its quick mode."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


def test_the_quick_mode_prints_a_table(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "messages.py"), "--quick"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ms per ask" in done.stdout
    assert "│ 30 " in done.stdout
