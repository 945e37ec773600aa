"""A study has one search at a time, on whatever machines they are."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from autopeft.errors import StorageError
from autopeft.searcher.controller import INTERRUPTED, SearchController
from autopeft.searcher.owner import StudyOwner
from autopeft.testing.plain_space import plain_space
from autopeft.utils import folder_lock
from autopeft.utils.folder_lock import Holder


@pytest.fixture(autouse=True)
def _short_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "WATCH_SECONDS", 0.3)


def beating(owner: StudyOwner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an owner beat while another one watches it."""
    sleep = time.sleep

    def beat(seconds: float) -> None:
        sleep(seconds)
        owner.beat()

    monkeypatch.setattr(time, "sleep", beat)


def test_a_living_owner_keeps_its_study(monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study(study_name="shared")
    first = StudyOwner("a", inode=1)
    first.claim(study)
    beating(first, monkeypatch)
    for other in (StudyOwner("b", inode=1), StudyOwner("a", inode=2)):
        with pytest.raises(StorageError, match="study_name='shared': a search runs in this study"):
            other.claim(study)
    first.end()
    StudyOwner("b", inode=1).claim(study)


def test_an_owner_that_is_silent_is_dead() -> None:
    study = optuna.create_study()
    StudyOwner("a", inode=1).claim(study)
    StudyOwner("b", inode=2).claim(study)


def test_an_earlier_session_of_the_same_folder_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study()
    first = StudyOwner("a", inode=1)
    first.claim(study)
    monkeypatch.setattr(
        "autopeft.searcher.owner.lives", lambda *_: pytest.fail("nobody is watched")
    )
    StudyOwner("a", inode=1).claim(study)


def test_the_running_trials_of_a_living_search_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a resume on another machine failed them, and trained them a second time."""
    arguments: dict[str, Any] = {"storage": str(tmp_path / "a.db"), "study_name": "shared"}
    space, objectives = plain_space(), ["accuracy", "trainable_params"]
    first = StudyOwner("a", inode=1)
    one = SearchController(space, objectives, owner=first, **arguments)
    trial = one.ask()
    assert trial is not None
    with monkeypatch.context() as patched:
        beating(first, patched)
        with pytest.raises(StorageError, match="a search runs in this study"):
            SearchController(
                space, objectives, owner=StudyOwner("b", inode=2), resume=True, **arguments
            )
    one.tell(trial, score=0.8)
    left = one.ask()
    assert left is not None
    first.end()
    other = SearchController(
        space, objectives, owner=StudyOwner("b", inode=2), resume=True, **arguments
    )
    assert [t.reason for t in other.trials()] == ["", INTERRUPTED]


def test_a_holder_of_long_ago_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study()
    first = StudyOwner("a", inode=1)
    first._record = replace(first._record, holder=Holder("x", 1, "2020", 0.0))
    first._study = study
    first._write(time.time() - 100)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it is watched"))
    StudyOwner("b", inode=2).claim(study)
