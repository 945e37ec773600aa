"""The benchmark of the search's own time per message, in its quick mode."""

from __future__ import annotations

from pathlib import Path

from quick_benchmarks import quick


def test_the_quick_mode_prints_a_table(tmp_path: Path) -> None:
    printed = quick("messages.py", tmp_path)
    assert "ms per ask" in printed
    assert "│ 30 " in printed
