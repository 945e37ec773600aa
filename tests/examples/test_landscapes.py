"""The benchmark on made-up landscapes, in its quick mode."""

from __future__ import annotations

import json
from pathlib import Path

from quick_benchmarks import quick


def test_the_quick_mode_prints_a_table_and_writes_shares(tmp_path: Path) -> None:
    output = tmp_path / "landscapes.json"
    assert "LoRA 25" in quick("landscapes.py", tmp_path, "--output", str(output))
    runs = json.loads(output.read_text())["runs"]
    shares = {run["sampler"]: run["shares"]["25"] for run in runs}
    assert 0 < shares["stock-random"] < shares["autopeft"] <= 1.001
