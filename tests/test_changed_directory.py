"""A user's function may change the working directory, or remove it; the search goes on where it is.

Nothing is found or written by a path that is relative after the search has begun.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from stand_in import trained

import autopeft
from autopeft.workspace import Workspace, read_settings

pytestmark = [pytest.mark.timeout(200)]

SHORT: dict[str, Any] = {
    **{"steps": 9, "rungs": 1, "budget": "3trials", "max_finalists": 1, "confirm_seeds": 1},
    **{"metric": "accuracy", "backend": "local", "progress": False},
}


class Leaving:
    """A callback that goes elsewhere, before anything is trained or at the first trial."""

    def __init__(self, at: str, place: Path) -> None:
        setattr(self, at, lambda *_: os.chdir(place))


def elsewhere_in(candidate: Any, *, seed: int, report: Any) -> Any:
    """Train, and leave for a folder that is removed."""
    gone = report.folder / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    return trained(candidate, seed=seed, report=report)


def test_a_search_stays_where_it_began(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the result was written elsewhere, with exit status 0 (issue 18)."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "tiny").symlink_to(tiny_model)
    monkeypatch.chdir(home)
    result = autopeft.search(
        model="tiny", evaluate=elsewhere_in, output="runs/one", storage="study.log", **SHORT
    )
    monkeypatch.chdir(home)
    assert result.view.is_complete
    assert result.place == "runs/one"
    assert {path.name for path in home.iterdir()} >= {"runs", "tiny"}
    assert (home / "runs/one/front.json").is_file()
    assert (home / "study.log").is_file()
    written = read_settings(home / "runs/one/settings.yaml")
    assert (written["output"], written["model"]) == ("runs/one", "tiny")
    again = autopeft.resume("runs/one", budget="4trials", evaluate=elsewhere_in, progress=False)
    assert again.view.trials["complete"] == 4
    monkeypatch.chdir(home)
    assert autopeft.report("runs/one").view.trials["complete"] == 4


@pytest.mark.parametrize("at", ["on_search_begin", "on_confirmation"])
def test_callbacks_may_change_the_directory(
    at: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    other.mkdir()
    (home / "tiny").symlink_to(tiny_model)
    monkeypatch.chdir(home)
    result = autopeft.search(
        model="tiny", evaluate=trained, output="run", callbacks=[Leaving(at, other)], **SHORT
    )
    assert Path.cwd() == other
    assert not list(other.iterdir())
    assert result.view.is_complete
    assert (result.folder / "front.json").is_file()
    assert result.best is not None


def test_a_workspace_keeps_what_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workspace = Workspace("run")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert workspace.folder == tmp_path / "run"
    assert (str(workspace.given), workspace.shown) == ("run", "run")
    for storage in ("s.db", "s.log", "sqlite:///s.db"):
        asked = autopeft.SearchSettings(model="m", storage=storage)
        path = str(workspace.storage(asked)).removeprefix("sqlite:///")
        assert path == str(tmp_path / storage.removeprefix("sqlite:///"))
    elsewhere = autopeft.SearchSettings(model="m", storage="postgresql://host/db")
    assert workspace.storage(elsewhere) == "postgresql://host/db"
