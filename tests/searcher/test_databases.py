"""Tests of real databases that fail: PostgreSQL restarted, SQLite locked and full, a proxy."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from optuna.storages._grpc.server import make_server
from postgres import PostgresServer, closed_connections, missing
from sqlalchemy import event

import autopeft
from autopeft.costs.topology import Topology
from autopeft.errors import StorageError, StorageFailure
from autopeft.searcher import storage as storage_module
from autopeft.searcher.controller import SearchController
from autopeft.searcher.space.space import SearchSpace
from autopeft.searcher.storage import open_storage, shown_place
from autopeft.searcher.study import read_study

SPACE = SearchSpace.from_source({"methods": ["lora"]}, Topology(2, {"attn.q": (64, 64)}))


def controller(storage: Any, resume: bool = False, name: str = "s") -> SearchController:
    return SearchController(SPACE, ["accuracy"], storage=storage, study_name=name, resume=resume)


def told(search: SearchController, n: int) -> None:
    for index in range(n):
        trial = search.ask()
        search.report(trial, 10, 0.1)
        search.tell(trial, score=0.5 + index / 100)


@pytest.fixture(autouse=True)
def all_connections_are_closed() -> Iterator[None]:
    """Leave no connection behind."""
    with closed_connections():
        yield


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    if reason := missing():
        pytest.skip(reason)
    made = PostgresServer()
    yield made
    made.remove()


def restarted(server: PostgresServer) -> None:
    server.stop()
    server.start()


def test_a_controller_survives_a_restart_before_each_verb(server: PostgresServer) -> None:
    search = controller(server.url, name="verbs")
    told(search, 1)
    restarted(server)
    trial = search.ask()
    restarted(server)
    search.report(trial, 10, 0.1)
    restarted(server)
    search.tell(trial, score=0.9)
    trials, _ = read_study(server.url, "verbs")
    assert trials == search.trials()
    assert [dict(trial.rungs) for trial in trials] == [{10: 0.1}, {10: 0.1}]


def test_a_restart_that_takes_a_while_is_waited_for(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "_QUIET_SECONDS", 0.2)
    search = controller(server.url, name="slow")
    trial = search.ask()
    server.stop()
    later = threading.Timer(1.0, server.start)
    later.start()
    with pytest.warns(UserWarning, match="does not answer"):
        search.tell(trial, score=0.9)
    later.join()
    assert read_study(server.url, "slow")[0] == search.trials()


def test_a_server_that_stays_away_is_one_line_and_the_tell_can_be_repeated(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "PATIENCE_SECONDS", 0.3)
    search = controller(server.url, name="away")
    trial = search.ask()
    server.stop()
    with pytest.raises(StorageFailure, match="efused") as caught:
        search.tell(trial, score=0.9)
    assert "\n" not in str(caught.value)
    with pytest.raises(StorageFailure):
        search.ask()
    server.start()
    search.tell(trial, score=0.9)
    told(search, 1)
    trials, _ = read_study(server.url, "away")
    assert trials == search.trials()
    assert len(trials) == 2


def test_a_search_goes_on_through_a_restart_and_resumes_after_an_outage(
    server: PostgresServer, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: it ended in a traceback, and a rung was lost (issue 18)."""
    calls = []

    def evaluate(candidate: Any, *, seed: int, report: autopeft.TrialReport) -> Any:
        calls.append(report.is_confirming)
        if len(calls) == 4:
            restarted(server)
        if len(calls) == 7:
            server.stop()
        for step in report.rungs:
            report(step, 0.5 - 0.3 / step)
        return {"accuracy": 0.5 + 0.001 * len(candidate.plan.specs)}

    settings: dict[str, Any] = {
        **{"steps": 27, "rungs": 2, "budget": "8trials", "max_finalists": 1},
        **{"metric": "accuracy", "backend": "local", "storage": server.url, "study_name": "run"},
    }
    monkeypatch.setattr(storage_module, "PATIENCE_SECONDS", 3.0)
    with pytest.raises(StorageFailure, match=r"storage postgresql.*efused") as caught:
        autopeft.search(
            model=str(tiny_model), evaluate=evaluate, output=tmp_path / "run", **settings
        )
    assert caught.value.exit_status == 1
    server.start()
    before, _ = read_study(server.url, "run")
    assert [trial.state for trial in before][:6] == ["complete"] * 6
    result = autopeft.resume(tmp_path / "run", evaluate=evaluate)
    after, _ = read_study(server.url, "run")
    assert after[:6] == before[:6]
    assert sum(trial.state == "complete" for trial in after) == 8
    assert len({len(trial.rungs) for trial in after if trial.state == "complete"}) == 1
    assert result.front


def test_a_locked_sqlite_file_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "_LOCKED_SECONDS", 0.01)
    path = tmp_path / "a.db"
    search = controller(path)
    trial = search.ask()
    other = sqlite3.connect(path, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(0.5, other.rollback)
    release.start()
    search.tell(trial, score=0.9)
    release.join()
    other.close()
    assert read_study(path, "s")[0] == search.trials()


def test_a_sqlite_file_that_stays_locked_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "_LOCKED_SECONDS", 0.01)
    monkeypatch.setattr(storage_module, "PATIENCE_SECONDS", 0.1)
    search = controller(tmp_path / "a.db")
    trial = search.ask()
    other = sqlite3.connect(tmp_path / "a.db")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StorageFailure, match="database is locked"):
        search.tell(trial, score=0.9)
    other.rollback()
    other.close()
    search.tell(trial, score=0.9)
    assert read_study(tmp_path / "a.db", "s")[0] == search.trials()


def test_a_full_disk_under_sqlite_is_one_line_at_once_and_resumes(tmp_path: Path) -> None:
    search = controller(tmp_path / "a.db")
    told(search, 2)
    engine = search.study._storage.inner._backend.engine
    trial = search.ask()
    n_pages = 1  # SQLite takes it for what there is.

    @event.listens_for(engine, "checkout")
    def limit(connection: Any, *_: Any) -> None:
        connection.execute(f"PRAGMA max_page_count={n_pages}")

    with pytest.raises(StorageFailure, match="database or disk is full") as caught:
        search.remember("large", "x" * 10**6)
    assert caught.value.seconds < 1.0  # It was not asked again.
    n_pages = 10**6
    search.tell(trial, score=0.9)
    again = controller(tmp_path / "a.db", resume=True)
    assert again.trials() == search.trials()


def test_optunas_proxy_is_a_storage(tmp_path: Path) -> None:
    inner: Any = open_storage(tmp_path / "a.db")
    proxy = make_server(inner.inner, "127.0.0.1", 0, ThreadPoolExecutor(2))
    port = proxy.add_insecure_port("127.0.0.1:0")
    proxy.start()
    try:
        search = controller(f"grpc://127.0.0.1:{port}")
        told(search, 2)
        trial = search.ask()
        proxy.stop(None).wait()
        proxy = make_server(inner.inner, "127.0.0.1", port, ThreadPoolExecutor(2))
        later = threading.Timer(0.3, proxy.start)
        later.start()
        search.tell(trial, score=0.7)
        later.join()
        again = controller(f"grpc://127.0.0.1:{port}", resume=True)
        assert again.trials() == search.trials() == read_study(tmp_path / "a.db", "s")[0]
    finally:
        proxy.stop(None).wait()


def test_a_proxy_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_CONNECT_SECONDS", 0.1)
    with pytest.raises(StorageError, match=r"storage='grpc://127.0.0.1:1': cannot"):
        open_storage("grpc://127.0.0.1:1")


def test_a_password_is_not_shown() -> None:
    assert "secret" not in shown_place("postgresql+psycopg://me:secret@host/db")
    assert shown_place("study.db") == "study.db"
