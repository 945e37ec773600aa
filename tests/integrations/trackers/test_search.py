"""A whole search with all trackers: interrupted, then resumed with another one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import autopeft

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore"),  # Of the trackers' own libraries.
]


def evaluate(candidate: autopeft.Candidate, *, seed: int, report: autopeft.TrialReport) -> Any:
    """Stand in for a training."""
    level = 0.6 + 0.01 * len(candidate.plan.specs)
    for step in report.rungs:
        report(step, level - 1 / step)
    (report.folder / "weights.txt").write_text(candidate.digest)
    return {"accuracy": level}


class Interrupt(autopeft.Callback):
    def on_trial_end(self, trial: Any) -> None:
        if trial.number == 2:
            raise KeyboardInterrupt


def test_a_search_is_tracked_once(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TRACKIO_PROJECT", "tracked-once")
    output = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        autopeft.search(
            model=str(tiny_model),
            evaluate=evaluate,
            metric="accuracy",
            steps=27,
            budget="6trials",
            max_finalists=1,
            confirm_seeds=1,
            backend="local",
            output=output,
            report_to="mlflow, trackio, wandb",
            callbacks=[Interrupt()],
        )
    assert "reports to mlflow (sqlite:///" in capfd.readouterr().err
    result = autopeft.resume(
        output, evaluate=evaluate, report_to=["mlflow", "trackio", "wandb", "tensorboard"]
    )
    out, err = capfd.readouterr()
    assert out == ""
    begins = ("trial", "watch", "reports to", "space", "tests.integrations", "confirmation")
    assert [line for line in err.splitlines() if not line.startswith(begins)] == []
    assert result.view.warnings == ()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("tracker")]

    from mlflow import MlflowClient
    from trackio.sqlite_storage import SQLiteStorage

    numbers = {int(line.split(",")[0]) for line in _rows(output / "trials.csv")}
    client = MlflowClient(uri)
    (experiment,) = (each for each in client.search_experiments() if each.name == "autopeft")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED", "FAILED"}
    parts = sorted(run.data.tags["autopeft.trial"] for run in runs)
    assert parts == sorted([*map(str, numbers), "search"])
    (parent,) = (run for run in runs if run.data.tags["autopeft.trial"] == "search")
    group = parent.info.run_name
    trials = [f"trial {number}" for number in numbers]
    names = SQLiteStorage.get_runs("tracked-once")
    assert sorted(names) == sorted(f"{group} {part}" for part in ["search", *trials])
    folders = {path.name for path in (output / "tensorboard").iterdir()}
    assert folders == {"search", *(f"trial-{number:04d}" for number in numbers)}
    ids = {path.stem.rpartition("-")[2] for path in output.glob("wandb/offline-run-*/run-*.wandb")}
    assert ids == {*map(str, numbers), "search"}


def _rows(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()[1:]
