"""The benchmark of one driver in front of many workers, in its quick mode."""

from __future__ import annotations

from pathlib import Path

from quick_benchmarks import quick


def test_the_quick_mode_serves_workers_and_loses_nothing(tmp_path: Path) -> None:
    cells = [line.split("│")[1:3] for line in quick("scale.py", tmp_path).splitlines()]
    rows = {row[0].strip(): row[1].strip() for row in cells if len(row) == 2}
    assert rows["decisions that the study lacks"] == "0"
    assert rows["reports, trials"].startswith("200, ")
