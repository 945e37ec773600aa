"""The examples for other tools run, prune, and keep most of the front."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def means(example: str, *flags: str) -> dict[str, list[float]]:
    """The last rows that an example prints: name -> numbers."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / example), *flags],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [re.split(r"\s{2,}", line) for line in done.stdout.splitlines() if "mean" in line]
    return {name: [float(number) for number in numbers] for _, name, *numbers in rows}


def test_an_optuna_study_is_pruned() -> None:
    found = means("optuna_pruning.py", "--seeds", "1", "--trials", "12", "--epochs", "12")
    whole, pruned, longer = found.values()
    assert [*found] == ["no pruner", "gap, as many trials", "gap, as many epochs"]
    assert whole[:3] == [12, 0, 12 * 12]
    assert pruned[0] == 12
    assert pruned[2] < 0.8 * whole[2] <= longer[2]
    assert longer[0] > 12
    assert min(whole[3], pruned[3], longer[3]) > 0.5


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_of_ray_tune_is_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # It joins no cluster of others.
    flags = {"seeds": "1", "trials": "8", "epochs": "15", "schedulers": "gap"}
    pairs = [(f"--{name}", value) for name, value in flags.items()]
    (row,) = means("ray_tune_pruning.py", *itertools.chain(*pairs)).values()
    n_ended, n_epochs, quality = row
    assert 1 <= n_ended < 8
    assert n_epochs < 0.9 * 8 * 15
    assert quality > 0.3
