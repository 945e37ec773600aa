"""Searches that are killed at random moments: nothing is lost or repeated."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kill_checks
import kill_search
import pytest

import autopeft

_KILLS = Path(__file__).parents[2] / "examples" / "benchmarks" / "kills.py"


def killed(*flags: str) -> str:
    done = subprocess.run(
        [sys.executable, str(_KILLS), *flags],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(_KILLS.parents[2])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.nightly
@pytest.mark.timeout(200)
def test_a_few_kills() -> None:
    assert "4 kills, 0 problems" in killed("--kills=4", "--seed=1", "--kinds=function,journal")


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_drivers_whose_workers_are_on_a_cluster() -> None:
    flags = ("--kills=3", "--seed=2", "--kinds=cluster", "--ways=driver")
    assert "3 kills, 0 problems" in killed(*flags)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_a_hundred_kills() -> None:
    assert "100 kills, 0 problems" in killed("--kills=100", "--seed=0")


@pytest.mark.parametrize(
    ("between", "n_problems"),
    [(("kill",), 1), (("kill", "killed"), 0), (("kill", "call"), 0), ((), 1)],
)
def test_a_training_begins_again_only_after_a_kill(
    between: tuple[str, ...], n_problems: int
) -> None:
    """One may have begun while something was being killed: after the kill's first line."""
    begin = {"event": "begin", "digest": "a", "seed": 1, "confirms": False}
    before, after = ([{"event": event} for event in part] for part in (between[:1], between[1:]))
    found = kill_checks.Found()
    kill_checks._check_repeats([*before, begin, *after, begin], found)
    assert len(found.problems) == n_problems, found


class _Stops(autopeft.Callback):
    def __init__(self, after: int) -> None:
        self._left = after

    def on_trial_end(self, trial: autopeft.Trial) -> None:
        self._left -= 1

    def on_progress(self, progress: Any) -> None:
        if self._left <= 0:
            raise KeyboardInterrupt


_NONE, _TRAINED = ("running", (), ()), ("complete", "pruned")


def _digests(folder: Path) -> list[str]:
    stored = kill_checks.stored_trials(f"sqlite:///{folder}/study.db", folder.name)
    ended = kill_checks.ended(stored)
    return [t.user_attrs["digest"] for t in stored if ended.get(t.number, _NONE)[0] in _TRAINED]


def test_a_search_repeats_itself_and_goes_on_where_it_was_stopped(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kill_search.LOG, str(tmp_path / "log.jsonl"))
    settings = {
        **kill_search.FUNCTION,
        **{"model": str(tiny_model), "objectives": ["trainable_params"], "budget": "20trials"},
        **{"backend": "local", "confirm_seeds": 1},
    }
    first, second = (autopeft.search(settings, output=tmp_path / name) for name in ("a", "b"))
    wanted = _digests(tmp_path / "a")
    assert len(wanted) == 20
    assert _digests(tmp_path / "b") == wanted
    assert second.view.front == first.view.front
    with pytest.raises(KeyboardInterrupt):
        autopeft.search(settings, output=tmp_path / "c", callbacks=_Stops(11))
    assert _digests(tmp_path / "c") == wanted[:11]
    autopeft.resume(tmp_path / "c")
    assert _digests(tmp_path / "c")[:13] == wanted[:13]  # Two had been proposed.
    assert len({*_digests(tmp_path / "c")}) == 20
