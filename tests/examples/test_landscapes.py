"""The benchmark on made-up landscapes, in its quick mode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


def test_the_quick_mode_prints_a_table_and_writes_shares(tmp_path: Path) -> None:
    output = tmp_path / "landscapes.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "landscapes.py"), "--quick", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "LoRA 25" in done.stdout
    runs = json.loads(output.read_text())["runs"]
    shares = {run["sampler"]: run["shares"]["25"] for run in runs}
    assert 0 < shares["stock-random"] < shares["autopeft"] <= 1.001
