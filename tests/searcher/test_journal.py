"""Tests of a journal whose last line a kill or a full disk left unfinished."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from autopeft.costs.topology import Topology
from autopeft.errors import StorageError, StorageFailure
from autopeft.searcher.controller import SearchController
from autopeft.searcher.space.space import SearchSpace
from autopeft.searcher.study import read_study

SPACE = SearchSpace.from_source({"methods": ["lora"]}, Topology(2, {"attn.q": (64, 64)}))


def controller(path: Path, resume: bool = False) -> SearchController:
    return SearchController(SPACE, ["accuracy"], storage=path, study_name="s", resume=resume)


def told(search: SearchController, n: int) -> None:
    for index in range(n):
        search.tell(search.ask(), score=0.5 + index / 100)


@pytest.mark.parametrize("n_lost", [1, 20])
def test_an_unfinished_last_line_is_cut_off_and_said(n_lost: int, tmp_path: Path) -> None:
    """Regression: Optuna wrote on after it, and nothing could read the study any more."""
    path = tmp_path / "a.log"
    told(controller(path), 3)
    path.write_bytes(path.read_bytes()[:-n_lost])
    with pytest.warns(UserWarning, match="its last line was unfinished"):
        again = controller(path, resume=True)
    told(again, 2)
    assert controller(path, resume=True).trials() == again.trials()
    assert [trial.state for trial in again.trials()][:2] == ["complete", "complete"]


def test_to_read_a_study_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    told(controller(path), 2)
    torn = path.read_bytes()[:-20]
    path.write_bytes(torn)
    trials, _ = read_study(path, "s")
    assert len(trials) == 2
    assert path.read_bytes() == torn


@pytest.mark.parametrize("damage", [b"\x00\x00", b"[1, 2]", b'{"op_code": 4'])
def test_a_damaged_line_before_it_is_refused_with_its_number(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    told(controller(path), 2)
    lines = path.read_bytes().splitlines()
    lines[4] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(StorageError, match="line 5 of the journal is damaged"):
        controller(path, resume=True)


def test_a_full_disk_is_one_line_and_leaves_no_half_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.log"
    search = controller(path)
    told(search, 2)
    trial = search.ask()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageFailure, match="No space left on device") as caught:
            search.tell(trial, score=0.9)
    assert "\n" not in str(caught.value)
    assert path.read_bytes().endswith(b"\n")
    search.tell(trial, score=0.9)
    assert controller(path, resume=True).trials() == search.trials()


def test_only_what_ends_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running trial is trained again if the machine dies: a disk is slower than all the rest."""
    search = controller(tmp_path / "a.log")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    trial = search.ask()
    search.report(trial, step=1, score=0.5)
    assert not synced
    search.tell(trial, score=0.5)
    assert len(synced) == 1
    search.remember("key", 1)
    assert len(synced) == 2
