"""Whole searches that share one study on purpose, in processes of their own."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joined
import pytest
from joined import begun, lines
from postgres import PostgresServer, closed_connections, missing
from searches import SHORT as SEARCH

import autopeft
from autopeft.errors import SettingsError, UserError
from autopeft.searcher import owner
from autopeft.searcher.study import read_study

pytestmark = [pytest.mark.timeout(200)]

SHORT: dict[str, Any] = {
    **{"steps": 9, "rungs": 1, "max_finalists": 2, "confirm_seeds": 1, "metric": "accuracy"},
    **{"backend": "local", "progress": False, "evaluate": "joined:logged"},
    **{"join": True, "study_name": "shared"},
}


@pytest.fixture(autouse=True)
def _log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(joined.LOG, str(tmp_path / "log.txt"))


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.nightly)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Return the place of an empty storage."""
    if request.param == "sqlite":
        yield str(tmp_path / "s.db")
        return
    if reason := missing():
        pytest.skip(reason)
    server = PostgresServer()
    with closed_connections():
        yield server.url
    server.remove()


def front_json(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "front.json").read_text())
    return content


@pytest.mark.parametrize(
    "backend", ["local", pytest.param("ray", marks=[pytest.mark.nightly, pytest.mark.timeout(600)])]
)
def test_two_searches_that_begin_at_once_share_one_study(
    tiny_model: Path, tmp_path: Path, storage: str, backend: str
) -> None:
    common = {**SHORT, "model": str(tiny_model), "storage": storage, "budget": "5trials"}
    common |= {"backend": backend, "workers": 2 if backend == "ray" else None}
    names = {"a": 0, "b": 1}
    both = [
        begun({**common, "output": str(tmp_path / name), "seed": seed})
        for name, seed in names.items()
    ]
    assert [process.wait() for process in both] == [0, 0]
    digests = [digest for digest, _ in lines("search")]
    assert len(digests) == len(set(digests)) == 10
    assert sum(t.state == "complete" for t in read_study(storage, "shared")[0]) == 10
    # One of them confirms, on a front of the trials of both.
    confirmed = lines("confirm")
    assert 0 < len(confirmed) == len(set(confirmed))
    assert not {seed for _, seed in confirmed} & {seed for _, seed in lines("search")}
    fronts = [front_json(tmp_path / name) for name in names]
    (last,) = [front for front in fronts if front["best"]]
    (other,) = [front for front in fronts if not front["best"]]
    assert last["trials"] == {"complete": 10, "pruned": 0, "failed": 0}
    assert "nothing is confirmed here: the search in " in " ".join(other["warnings"])
    assert other["complete"] is last["complete"] is True


@pytest.mark.nightly
def test_a_killed_search_is_taken_over_and_then_resumed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "WATCH_SECONDS", 2.0)
    common = {**SHORT, "model": str(tiny_model), "storage": str(tmp_path / "s.db")}
    first, second = tmp_path / "a", tmp_path / "b"
    process = begun({**common, "output": str(first), "budget": "6trials"}, **{joined.HANG_AT: "3"})
    until = time.monotonic() + 100
    while len(lines("search")) < 3:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.kill()
    process.wait()
    killed = lines("search")[-1]
    autopeft.search(**common, output=second, budget="4trials")
    # What the dead search was training comes first.
    assert lines("search")[3] == killed
    assert front_json(second)["best"]
    confirmed = lines("confirm")
    autopeft.resume(first, progress=False)
    # Of its six trials two had ended; the one that was trained, and the next one, were taken over.
    assert len(lines("search")) == 3 + 4 + 4
    assert len(set(lines("search"))) == 3 + 4 + 4 - 1
    assert lines("confirm") == confirmed
    assert "has confirmed before" in " ".join(front_json(first)["warnings"])
    assert front_json(first)["trials"] == {"complete": 10, "pruned": 0, "failed": 0}
    # The one that confirms does so for the trials of both.
    autopeft.resume(second, progress=False, budget="5trials")
    assert front_json(second)["trials"]["complete"] == 11
    assert len(lines("confirm")) == len(set(lines("confirm")))


def test_real_trainings_join_with_the_sizes_of_the_study(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    common = {**SEARCH, "model": str(tiny_model), "data": str(tiny_data), "progress": False}
    common |= {"storage": str(tmp_path / "s.db"), "join": True, "study_name": "shared"}
    common["budget"] = "2trials"
    autopeft.search(**common, output=tmp_path / "a")
    asked = {**common, "seed": 7, "steps": None, "batch_size": None}
    autopeft.search(**asked, output=tmp_path / "b")
    trials, _ = read_study(tmp_path / "s.db", "shared")
    assert len({trial.digest for trial in trials}) == 4
    assert {(trial.train.steps, trial.train.batch_size) for trial in trials} == {(12, 8)}
    assert sum(front_json(tmp_path / "b")["trials"].values()) == 4
    for name, value in (("steps", 13), ("constraints", ["trainable_params<=1m"])):
        with pytest.raises(SettingsError, match=f"{name}=.*the study was begun with"):
            autopeft.search(**{**common, name: value}, output=tmp_path / "c")
    fewer = tmp_path / "fewer.csv"
    fewer.write_text("".join(tiny_data.read_text().splitlines(keepends=True)[:-20]))
    with pytest.raises(UserError, match="the study was begun with other rows"):
        autopeft.search(**{**common, "data": str(fewer)}, output=tmp_path / "c")
    assert not (tmp_path / "c").exists()
