"""A run folder belongs to one search at a time; under any name it is the same search."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from searches import SHORT as SEARCH
from stand_in import SHORT, Held, trained

import autopeft
from autopeft import api
from autopeft.errors import SettingsError, StorageError
from autopeft.workspace import Workspace

pytestmark = [pytest.mark.timeout(200)]


def test_a_running_search_has_its_folder_alone(tiny_model: Path, tmp_path: Path) -> None:
    """Regression: the second search emptied the folder of the first."""
    folder, held, errors = tmp_path / "run", Held(), []

    def first() -> None:
        try:
            autopeft.search(model=str(tiny_model), evaluate=held, output=folder, **SHORT)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    assert held.began.wait(100)
    before = {p: p.read_bytes() for p in folder.rglob("*.yaml")}
    running = f"is in use by process {os.getpid()} on .* since"
    with pytest.raises(StorageError, match=running):
        autopeft.search(model=str(tiny_model), evaluate=trained, output=folder, **SHORT)
    with pytest.raises(StorageError, match=running):
        autopeft.resume(folder, evaluate=trained, progress=False)
    # What `export --score` adds to front.json would be lost, or undo what the search writes.
    with pytest.raises(StorageError, match=running):
        autopeft.export(folder, score=True, to=tmp_path / "out")
    # Who only reads is not locked out.
    with pytest.raises(SettingsError, match="no result yet"):
        autopeft.report(folder)
    with pytest.raises(SettingsError, match="no result yet"):
        autopeft.export(folder, to=tmp_path / "out")
    assert before == {p: p.read_bytes() for p in folder.rglob("*.yaml")}
    held.may_go_on.set()
    thread.join()
    assert not errors
    assert autopeft.report(folder).view.trials["complete"] == 3


def test_only_ones_own_files_are_removed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: whatever lay in the folder went when a mistake was found late."""
    folder, remember = tmp_path / "run", Workspace.remember

    def beside(self: Workspace, name: str, value: Any) -> None:
        remember(self, name, value)
        (folder / "notes.txt").write_text("mine")

    monkeypatch.setattr(Workspace, "remember", beside)
    with pytest.raises(SettingsError, match="constraint"):
        autopeft.search(
            model=str(tiny_model),
            evaluate=trained,
            output=folder,
            constraints=["trainable_params<=1"],
            **SHORT,
        )
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_mistake_leaves_no_folder(tiny_model: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(SettingsError, match="budget"):
            autopeft.search(
                model=str(tiny_model),
                evaluate=trained,
                output=tmp_path / "a" / "b",
                **{**SHORT, "budget": "soon"},
            )
    assert not list(tmp_path.iterdir())


AWKWARD = "what? a#b%20{x} naïve☃ 'q\" [a]*"


def test_any_name_of_a_folder_works(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: `runs/what?` put the study elsewhere, and a moved folder lost it."""
    monkeypatch.chdir(tmp_path)
    first, second = Path("runs") / AWKWARD, Path("moved") / f"2{AWKWARD}"
    with tiny_data.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    autopeft.search(SEARCH, model=str(tiny_model), data=rows, output=first, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert [path.name for path in Path("runs").iterdir()] == [AWKWARD]
    assert (first / "study.db").stat().st_size > 0
    for before, after in ((first, second), (second, first)):
        after.parent.mkdir(exist_ok=True)
        before.rename(after)
        again = autopeft.resume(after, progress=False)
        assert sum(again.view.trials.values()) == 4
        shown = autopeft.report(after)
        assert (shown.folder, shown.place) == (after.absolute(), str(after))
        assert len(again.plot("curves").axes[0].lines) > 0
    autopeft.export(first, to=f"out {AWKWARD}", format="merged")


@pytest.fixture(scope="module")
def searched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search of three trials, with rows that it saved itself."""
    folder = tmp_path_factory.mktemp("whole") / "first"
    autopeft.search(model=str(tiny_model), evaluate=trained, output=folder, **SHORT)
    return folder


@pytest.mark.parametrize("how", ["renamed", "copied", "linked", "dotted", "former"])
def test_a_folder_under_another_name_is_resumed(
    how: str, searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the study had the name of the folder, and was not found under another one."""
    first, other = tmp_path / "first", tmp_path / "second"
    shutil.copytree(searched, first)
    if how == "former":
        # As written before the name of the study was among the settings.
        path = first / "settings.yaml"
        text = path.read_text().replace("study_name: first", "study_name: null")
        path.write_text(text.replace(str(searched), "runs/first"))
        (first / "state" / "place.json").unlink()
    if how in ("renamed", "former"):
        first.rename(other)
    elif how == "copied":
        shutil.copytree(first, other)
    elif how == "linked":
        other.symlink_to(first)
    else:
        (tmp_path / "x").mkdir()
        other = tmp_path / "x" / ".." / "first"
    again = autopeft.resume(other, evaluate=trained, progress=False, budget="4trials")
    assert sum(again.view.trials.values()) == 4
    assert len(again.plot("curves").axes[0].lines) == 4
    autopeft.report(other)
    served = []
    monkeypatch.setattr("optuna_dashboard.run_server", lambda storage, *_: served.append(storage))
    api.dashboard(other)
    (study,) = served[0].get_all_studies()
    assert study.study_name == "first"
    assert len(served[0].get_all_trials(study._study_id)) == 4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("delete from trial_user_attributes where trial_id=2", "trial 1 was .* and is no trial of"),
        ("update trials set number=0", "has lost 2 of the 3 trials in trials.csv: trial 1"),
        ("update trials set state='RUNNING' where number=2", "trial 2 was .* and is running"),
        ("drop table trials", "it has no table trials"),
    ],
)
def test_a_report_is_not_written_without_trials_that_its_study_has_lost(
    change: str, told: str, searched: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "first"
    shutil.copytree(searched, folder)
    with closing(sqlite3.connect(folder / "study.db")) as database:
        database.execute(change)
        database.commit()
    before = {name: (folder / name).read_bytes() for name in ("trials.csv", "front.json")}
    with pytest.raises(StorageError, match=f"storage='.*study.db': .*{told}"):
        autopeft.resume(folder, budget="5trials", progress=False)
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_a_copy_is_another_search(searched: Path, tmp_path: Path) -> None:
    shutil.copytree(searched, tmp_path / "first")
    first, moved = Workspace(tmp_path / "first"), Workspace(tmp_path / "moved")
    name = first.id()
    assert name != Workspace(searched).id()
    first.folder.rename(moved.folder)
    assert moved.id() == name


@pytest.mark.usefixtures("hangup_heeded")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_search_that_is_terminated_while_it_prepares_leaves_nothing(
    number: signal.Signals, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: it ended at once, without a word."""
    monkeypatch.setattr("autopeft.session.prepare", lambda *_, **__: signal.raise_signal(number))
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt, match="no trial was begun"):
        autopeft.search(model=str(tiny_model), evaluate=trained, output=folder, **SHORT)
    assert not folder.exists()


@pytest.mark.usefixtures("hangup_heeded")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_terminated_search_is_saved_and_resumed(
    number: signal.Signals, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = tmp_path / "run", []

    def evaluate(candidate: Any, *, seed: int, report: Any) -> Any:
        calls.append(seed)
        if len(calls) == 2:
            signal.raise_signal(number)
        return trained(candidate, seed=seed, report=report)

    saved = f"everything is saved: `autopeft resume {folder}` continues"
    with pytest.raises(KeyboardInterrupt, match=saved):
        autopeft.search(model=str(tiny_model), evaluate=evaluate, output=folder, **SHORT)
    assert json.loads((folder / "front.json").read_text())["complete"] is False
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr("autopeft.session.prepare", lambda *_, **__: signal.raise_signal(number))
        with pytest.raises(KeyboardInterrupt, match=saved):
            autopeft.resume(folder, evaluate=trained, progress=False)
    assert signal.getsignal(number) is before
    again = autopeft.resume(folder, evaluate=trained, progress=False)
    assert again.view.trials["complete"] == 3


def test_a_search_that_was_killed_before_its_study_was_made_is_resumed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr("autopeft.session.SearchController", killed)
        with pytest.raises(RuntimeError, match="killed"):
            autopeft.search(model=str(tiny_model), evaluate=trained, output=folder, **SHORT)
    assert not (folder / "study.db").exists()
    again = autopeft.resume(folder, evaluate=trained, progress=False)
    assert again.view.trials["complete"] == 3


def killed(*_: Any, **__: Any) -> None:
    """End as no mistake of a user's does."""
    raise RuntimeError("killed")


def test_the_time_of_a_killed_search_is_booked(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: what was not yet written when a search was killed, a quarter, was not spent."""
    folder = tmp_path / "run"

    def spent() -> tuple[float, float]:
        path = folder / "state" / "spent.json"
        if not path.exists():
            return 0.0, 0.0
        kept = json.loads(path.read_text())
        return kept["seconds"], sum(kept["phases"].values())

    def until_more(*_: Any, **__: Any) -> None:
        """End once more was booked twice, with no message of progress."""
        for _time in range(2):
            before, until = spent()[0], time.monotonic() + 60
            while spent()[0] == before:
                assert time.monotonic() < until, "nothing is booked"
                time.sleep(0.05)
        raise RuntimeError("killed")

    monkeypatch.setattr("autopeft.session.run_all", until_more)
    with pytest.raises(RuntimeError, match="killed"):
        autopeft.search(model=str(tiny_model), evaluate=trained, output=folder, **SHORT)
    first = spent()
    monkeypatch.setattr("autopeft.session.prepare", until_more)
    with pytest.raises(RuntimeError, match="killed"):
        autopeft.resume(folder, evaluate=trained, progress=False)
    assert spent()[0] > first[0] + 0.9
    for total, by_phase in (first, spent()):
        assert by_phase == pytest.approx(total, rel=0.02)


def test_a_copy_does_not_write_into_the_study_of_its_original(
    tiny_model: Path, tmp_path: Path
) -> None:
    first, copy, moved = tmp_path / "first", tmp_path / "copy", tmp_path / "moved"
    storage: dict[str, Any] = {"storage": str(tmp_path / "shared.db")}
    autopeft.search(model=str(tiny_model), evaluate=trained, output=first, **SHORT, **storage)
    shutil.copytree(first, copy)
    again: dict[str, Any] = {"evaluate": trained, "progress": False, "budget": "4trials"}
    with pytest.raises(StorageError, match=r"is a copy of .*first, and both have one study"):
        autopeft.resume(copy, **again)
    first.rename(moved)
    assert sum(autopeft.resume(moved, **again).view.trials.values()) == 4
