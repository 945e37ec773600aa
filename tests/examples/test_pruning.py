"""The benchmark of pruning rules: its quick mode, and a replay of curves in a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


def run(output: Path, *flags: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "pruning.py"), "--output", str(output), *flags],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "arrival orders" in done.stdout
    runs: list[dict[str, Any]] = json.loads(output.read_text())["runs"]
    return runs


def test_on_made_up_curves_the_gap_rules_save_much_and_lose_little(tmp_path: Path) -> None:
    runs = run(tmp_path / "out.json", "--quick", "--rules", "none,trusting,gap")
    for row in runs:
        if row["job"]["rule"] == "none":
            assert row["compute"] == pytest.approx(1.0)
            assert (row["volume"], row["lost"]) == (1.0, 0.0)
        else:
            assert row["compute"] < (0.7 if row["job"]["rule"] == "gap" else 0.4)
            assert row["volume"] > 0.85


def test_recorded_curves_are_replayed(tmp_path: Path) -> None:
    rows = [
        {
            "name": f"run {i}",
            "test_accuracy": accuracy,
            "peak_memory_bytes": 1000 + i,
            "trainable_params": 10 * (i + 1),
            "train_seconds": 5.0,
            "curve": [{"step": 10 * k, "train_loss": 1.0 - accuracy} for k in range(1, 11)],
        }
        for i, accuracy in enumerate((0.5, 0.1, 0.6, 0.2))
    ]
    path = tmp_path / "curves.json"
    path.write_text(json.dumps({"runs": rows}))
    runs = run(tmp_path / "out.json", "--quick", "--rules", "trusting", "--curves", str(path))
    assert all(row["volume"] == 1.0 and row["lost"] == 0.0 for row in runs)
    assert all(row["compute"] < 0.7 for row in runs)
