"""Each tracker's store, read back by its own client: a search, interrupted and resumed."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from told import COMPLETE, FAILED, PRUNED, STILL_RUNNING, TOLD, result, start, tell_trials

from autopeft.engine.callback import CallbackList
from autopeft.integrations.trackers.registry import make_trackers

pytestmark = pytest.mark.filterwarnings("ignore")  # Of the trackers' own libraries.


@pytest.fixture(scope="session", autouse=True)
def _stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Stores away from the user's; trackio reads its folder when it is imported."""
    folder = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_CACHE_DIR", str(folder / "wandb"))
        patch.setenv("WANDB_DATA_DIR", str(folder / "wandb"))
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        for name in ("WANDB_PROJECT", "WANDB_DIR", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        yield


def report(name: str, folder: Path) -> None:
    """A search that is interrupted while a trial runs, then resumed and ended."""
    folder.mkdir(exist_ok=True)
    steps: tuple[Callable[[CallbackList], None], ...] = (_first_session, _second_session)
    for session, is_resumed in zip(steps, (False, True), strict=True):
        callbacks = CallbackList(make_trackers([name]))
        ended = TOLD if is_resumed else ()
        callbacks.call("on_search_begin", start(folder, *ended, is_resumed=is_resumed))
        session(callbacks)
        found = result(folder, is_complete=is_resumed)
        callbacks.call("on_search_end", found)
        assert callbacks.failures == []


class _Caller:
    """Calls a list of callbacks as if it were one."""

    def __init__(self, callbacks: CallbackList) -> None:
        self._callbacks = callbacks

    def __getattr__(self, event: str) -> Callable[..., None]:
        return lambda *arguments: self._callbacks.call(event, *arguments)


def _first_session(callbacks: CallbackList) -> None:
    tell_trials(_Caller(callbacks), *TOLD)
    callbacks.call("on_trial_begin", STILL_RUNNING)


def _second_session(callbacks: CallbackList) -> None:
    tell_trials(_Caller(callbacks), RETRIED)


RETRIED = type(COMPLETE)(21, COMPLETE.candidate, COMPLETE.costs, "user", "failed", reason="no luck")
NUMBERS = {COMPLETE.number, PRUNED.number, FAILED.number, STILL_RUNNING.number, RETRIED.number}
CURVE = pytest.approx({step: -score for step, score in COMPLETE.rungs})
N_POINTS = len(COMPLETE.rungs)
ACCURACY = COMPLETE.values["accuracy"]


def check_mlflow(uri: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("autopeft")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    trials = {run.data.tags["autopeft.trial"]: run for run in runs if run is not parent}
    assert len(trials) == len(runs) - 1
    assert set(map(int, trials)) == NUMBERS
    assert {r.data.tags["mlflow.parentRunId"] for r in trials.values()} == {parent.info.run_id}
    run = trials[str(COMPLETE.number)]
    assert float(run.data.params["learning_rate"]) == COMPLETE.train.learning_rate
    assert run.data.metrics["final/validation_accuracy"] == pytest.approx(ACCURACY)
    history = client.get_metric_history(run.info.run_id, "rung/validation_loss")
    assert {point.step: point.value for point in history} == CURVE
    assert len(history) == N_POINTS
    states = {n: (r.info.status, r.data.tags["state"]) for n, r in trials.items()}
    assert states[str(COMPLETE.number)] == ("FINISHED", "complete")
    assert states[str(PRUNED.number)] == ("KILLED", "pruned")
    assert states[str(FAILED.number)] == ("FAILED", "failed")
    assert trials[str(STILL_RUNNING.number)].data.tags["reason"] == "interrupted"
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["verdict"].startswith("No: LoRA is as good.")
    assert parent.data.metrics["best/test_accuracy"] > 0.5
    top = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert top == {"adapters", "front.json", "report.html", "settings.yaml"}
    table = json.loads(
        Path(client.download_artifacts(parent.info.run_id, "front.json")).read_text()
    )
    assert {"accuracy", "seeds", "digest"} <= set(table["columns"])
    (first, *_) = client.list_artifacts(parent.info.run_id, "adapters")
    (weights,) = client.list_artifacts(parent.info.run_id, first.path)
    assert weights.path.endswith("weights.txt")


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # Where a database keeps its artifacts.
    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    report("mlflow", tmp_path / "run")
    check_mlflow(uri)


@pytest.mark.nightly
@pytest.mark.timeout(240)
def test_a_server_of_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    store = ["--backend-store-uri", f"sqlite:///{tmp_path / 'runs.db'}"]
    place = ["--artifacts-destination", str(tmp_path / "files"), "--port", str(port)]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", *store, *place]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
        )
    try:
        for _ in range(90):
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.skip(f"mlflow server did not start: {(tmp_path / 'log').read_text()[-300:]}")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        report("mlflow", tmp_path / "run")
        check_mlflow(uri)
    finally:
        os.killpg(server.pid, 15)
        server.wait(20)


def records(path: Path) -> Iterator[Any]:
    """The records of wandb's file: parts in blocks of 32 KiB, after checksum, size and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, content = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32_768 - place % 32_768
        _, size, kind = struct.unpack_from("<IHB", data, place)
        if left < 7 or kind == 0:
            place += left
            continue
        content += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # A whole record, or its last part.
            yield Record.FromString(content)
            content = b""


def test_wandb(tmp_path: Path) -> None:
    report("wandb", tmp_path)
    runs: dict[str, list[Any]] = {}
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        found = [*records(path)]
        (run,) = (each.run for each in found if each.WhichOneof("record_type") == "run")
        assert run.run_group == "told-1d"
        assert run.project == "autopeft"
        runs.setdefault(run.run_id, []).extend(found)
    assert set(runs) == {"1d-search", *(f"1d-{number}" for number in NUMBERS)}

    def of(run: str, kind: str) -> list[Any]:
        return [getattr(r, kind) for r in runs[run] if r.WhichOneof("record_type") == kind]

    def items(rows: Any) -> dict[str, Any]:
        return {row.key or ".".join(row.nested_key): json.loads(row.value_json) for row in rows}

    trial = f"1d-{COMPLETE.number}"
    config = items(of(trial, "run")[0].config.update)
    assert config["learning_rate"] == COMPLETE.train.learning_rate
    history = [items(each.item) for each in of(trial, "history")]
    assert {row["_step"]: row["rung/validation_loss"] for row in history} == CURVE
    assert len(history) == N_POINTS
    assert history[-1]["final/validation_accuracy"] == pytest.approx(ACCURACY)
    ends = {n: of(f"1d-{n}", "exit")[-1].exit_code for n in NUMBERS}
    assert [number for number, code in ends.items() if code == 0] == [
        COMPLETE.number, PRUNED.number,
    ]  # fmt: skip
    summary = {k: v for each in of("1d-search", "summary") for k, v in items(each.update).items()}
    assert summary["verdict"].startswith("No: LoRA is as good.")
    assert summary["front.nrows"] > 3
    names = {each.name for each in of("1d-search", "artifact") if each.type == "model"}
    assert names == {f"adapter-{path.name}" for path in (tmp_path / "adapters").iterdir()}
    ended = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True)
    assert b"wandb-core" not in ended.stdout


def test_trackio(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report("trackio", tmp_path)
    assert capfd.readouterr() == ("", "")
    from trackio.sqlite_storage import SQLiteStorage as Storage

    names = Storage.get_runs("autopeft")
    assert set(names) == {"told-1d search", *(f"told-1d trial {number}" for number in NUMBERS)}
    assert len(names) == len(NUMBERS) + 1
    run = f"told-1d trial {COMPLETE.number}"
    config = Storage.get_run_config("autopeft", run)
    assert config["learning_rate"] == COMPLETE.train.learning_rate
    assert config["_Group"] == "told-1d"
    rows = Storage.get_logs("autopeft", run)
    name = "rung/validation_loss"
    assert {row["step"]: row[name] for row in rows if name in row} == CURVE
    assert sum(name in row for row in rows) == N_POINTS
    assert rows[-1]["state"] == "complete"
    failed = Storage.get_logs("autopeft", f"told-1d trial {FAILED.number}")
    assert (failed[-1]["state"], failed[-1]["reason"]) == ("failed", FAILED.reason)
    search = Storage.get_logs("autopeft", "told-1d search")
    (table,) = (row["front"]["_value"] for row in search[-1:])
    assert {"accuracy", "seeds", "digest"} <= set(table[0])
    assert search[-1]["verdict"].startswith("No: LoRA is as good.")
    kept = {each["name"] for each in Storage.list_artifacts("autopeft")}
    adapters = {f"adapter-{path.name}" for path in (tmp_path / "adapters").iterdir()}
    assert kept == {"report-1d", *adapters}


def test_tensorboard(tmp_path: Path) -> None:
    report("tensorboard", tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(part: str) -> Any:
        found = EventAccumulator(str(tmp_path / "tensorboard" / part))
        found.Reload()
        return found

    parts = {path.name for path in (tmp_path / "tensorboard").iterdir()}
    assert parts == {"search", *(f"trial-{number:04d}" for number in NUMBERS)}
    trial = read(f"trial-{COMPLETE.number:04d}")
    points = trial.Scalars("rung/validation_loss")
    assert {point.step: point.value for point in points} == CURVE
    assert len(points) == N_POINTS
    assert trial.Scalars("final/validation_accuracy")[0].value == pytest.approx(ACCURACY)
    assert b"learning_rate" in trial.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    search = read("search")

    def text(name: str) -> str:
        last = max(search.Tensors(f"{name}/text_summary"), key=lambda each: each.step)
        return str(last.tensor_proto.string_val[0], "utf-8")

    assert text("verdict").startswith("No: LoRA is as good.")
    assert "| accuracy |" in text("front")
    for folder in (tmp_path / "adapters").iterdir():
        assert str(folder) in text("files")


@pytest.mark.parametrize(
    ("name", "settings", "problem"),
    [
        ("mlflow", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "nothing answers at http"),
        ("trackio", {"TRACKIO_SERVER_URL": "http://127.0.0.1:9"}, "nothing answers at http"),
        (
            "wandb",
            {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9"},
            "nothing answers at http",
        ),
    ],
)
def test_a_server_that_is_not_there(
    name: str,
    settings: dict[str, str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for variable, value in settings.items():
        monkeypatch.setenv(variable, value)
    callbacks = CallbackList(make_trackers([name]))
    callbacks.call("on_search_begin", start(tmp_path))
    tell_trials(_Caller(callbacks), COMPLETE)
    (line,) = callbacks.failures
    assert line.startswith(f"report_to={name} failed ({problem}")
    assert capfd.readouterr() == ("", "")
