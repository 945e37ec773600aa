"""The output folder: it holds one search, and its files are whole or absent."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import autopeft
from autopeft.engine.budget import Spent
from autopeft.errors import SettingsError, StorageError
from autopeft.settings import SearchSettings
from autopeft.workspace import Workspace, read_settings


def test_settings_come_back(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "run")
    settings = SearchSettings(model="m", data="d", space={"methods": ["lora"]}, budget="5trials")
    workspace.check_free()
    workspace.create(settings)
    assert workspace.settings() == replace(settings, study_name="run")


def test_a_second_search_is_refused_and_sent_to_resume(tmp_path: Path) -> None:
    Workspace(tmp_path / "run").create(SearchSettings())
    with pytest.raises(StorageError, match="autopeft resume"):
        Workspace(tmp_path / "run").check_free()


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StorageError, match="not empty"):
        Workspace(tmp_path).check_free()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(StorageError, match="is a file"):
        Workspace(tmp_path / "run").check_free()


def test_no_search_no_settings(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="holds no search"):
        Workspace(tmp_path).settings()


def test_what_is_remembered_is_recalled(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert workspace.recall("spent", Spent) is None
    spent = Spent(1.5, 3, 1e9, {"search": 1.0}, {"train": 0.5})
    workspace.remember("spent", spent)
    assert workspace.recall("spent", Spent) == spent
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["spent.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{", "null", '{"seconds": "many"}', '{"phases": []}']
)
def test_a_damaged_state_file_is_named(tmp_path: Path, text: str) -> None:
    workspace = Workspace(tmp_path)
    workspace.remember("spent", {"seconds": 1.5})
    (tmp_path / "state" / "spent.json").write_text(text)
    with pytest.raises(StorageError, match=r"spent\.json.*delete it"):
        workspace.recall("spent", Spent)


def test_a_space_of_tuples_can_be_kept(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "run")
    workspace.create(SearchSettings(space={"methods": ("lora",)}))
    assert workspace.settings().space == {"methods": ["lora"]}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.yaml"):
        read_settings(tmp_path / "nowhere.yaml")


def test_the_settings_of_an_earlier_version_are_read_by_their_new_names(tmp_path: Path) -> None:
    """Regression: a folder written before settings were renamed could not be read."""
    (tmp_path / "settings.yaml").write_text("model: m\ndata: d\nprefix_cache: false\npack: 2\n")
    settings = Workspace(tmp_path).settings()
    assert settings.activation_cache is False
    assert settings.trials_per_worker == 2


def test_columns_that_an_earlier_version_always_wrote_are_recognized_instead(
    tmp_path: Path,
) -> None:
    former = {"text": "text", "label": "stars", "prompt": "prompt", "completion": "completion"}
    (tmp_path / "settings.yaml").write_text(
        yaml.safe_dump({"model": "m", "data": "d.csv", "task": "text-classification", **former})
    )
    assert Workspace(tmp_path).settings().column_names() == {"label": "stars"}
    (tmp_path / "settings.yaml").write_text("model: m\ndata: d.csv\ntext: text\n")
    assert Workspace(tmp_path).settings().column_names() == {"text": "text"}


@pytest.mark.slow
def test_a_search_behind_a_url_is_resumed_on_another_machine(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path}/there/run"
    short: dict[str, Any] = {"steps": 4, "batch_size": 8, "confirm_seeds": 1, "max_finalists": 1}
    short["backend"] = "local"
    monkeypatch.setenv("HOME", str(tmp_path / "first"))
    first = autopeft.search(
        model=str(tiny_model), data=str(tiny_data), output=url, budget="3trials", **short
    )
    shutil.rmtree(first.folder)
    monkeypatch.setenv("HOME", str(tmp_path / "second"))
    resumed = autopeft.resume(url, budget="5trials")
    assert resumed.view.trials["complete"] == 5
    assert autopeft.SearchResult.read(url).best_config == resumed.best_config
    assert (tmp_path / "there" / "run" / "report.html").exists()
    with pytest.raises(StorageError, match="holds another search"):
        autopeft.search(
            model=str(tiny_model), data=str(tiny_data), output=url, budget="3trials", **short
        )


@pytest.mark.parametrize(
    "left",
    [
        (".settings.yaml.abc.draft",),
        ("state/.definition.json.abc.draft",),
        ("state/definition.json",),
        ("state/definition.json", ".settings.yaml.abc.draft"),
    ],
)
def test_a_search_that_was_killed_as_it_wrote_its_settings_can_be_begun_again(
    tmp_path: Path, left: tuple[str, ...]
) -> None:
    """Regression: the folder was "not empty", and nothing in it could be resumed."""
    workspace = Workspace(tmp_path / "run")
    for name in (".lock", *left):  # as a killed process leaves them
        (workspace.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace.folder / name).touch()
    with workspace.held(is_new=True):
        assert not list(workspace.folder.glob("*.draft"))
        assert not (workspace.folder / "state").exists()


@pytest.mark.parametrize("name", ["state/notes.txt", "state/definition.json/x", "data/rows.jsonl"])
def test_files_of_others_stay_where_a_search_would_begin(tmp_path: Path, name: str) -> None:
    workspace = Workspace(tmp_path / "run")
    other = workspace.folder / name
    other.parent.mkdir(parents=True)
    other.touch()
    (workspace.folder / ".lock").touch()
    with pytest.raises(StorageError, match="not empty"), workspace.held(is_new=True):
        pass
    assert other.exists()


def test_relative_paths_are_those_of_the_folder_where_the_search_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: from elsewhere, neither `resume` nor `export` found the model."""
    began, other = tmp_path / "began", tmp_path / "other"
    for name in ("model", "rows", "earlier", "runs"):
        (began / name).mkdir(parents=True)
    for name in (
        "a.csv",
        "rows/1.jsonl",
        "text.txt",
        "prior.json",
        "s.db",
        "squad.jsonl",
        "own.yaml",
    ):
        (began / name).touch()
    (other / "model").mkdir(parents=True)  # Another one.
    given: dict[str, Any] = {
        "model": "model",
        "data": ("a.csv", "rows/*.jsonl"),
        "validation": "hub/rows",
        "retain": "text.txt",
        "also": ({"name": "squad", "data": "squad.jsonl", "metric": "loss"},),
        "warm_start": "earlier",
        "prior": "prior.json",
        "storage": "sqlite:///s.db",
        "space": "own.yaml",
        "output": "runs/first",
    }
    monkeypatch.chdir(began)
    Workspace("runs/first").create(SearchSettings(**given))
    assert Workspace("runs/first").settings() == SearchSettings(**given, study_name="first")
    monkeypatch.chdir(other)
    found = Workspace("../began/runs/first").settings()
    assert found.model == str(began / "model")
    assert found.data == (str(began / "a.csv"), str(began / "rows/*.jsonl"))
    assert found.validation == "hub/rows"
    assert found.retain == str(began / "text.txt")
    assert found.also[0]["data"] == str(began / "squad.jsonl")
    assert (found.warm_start, found.prior) == (str(began / "earlier"), str(began / "prior.json"))
    assert found.storage == f"sqlite:///{began / 's.db'}"
    assert found.space == str(began / "own.yaml")
    # Moved with all that it names, it is used as before.
    shutil.move(began, tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert Workspace("runs/first").settings().model == "model"


def test_data_saved_in_a_folder_is_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "data" / "train.jsonl").touch()
    settings = SearchSettings(data="run/data/train.jsonl", output="run", space="default")
    Workspace("run").create(settings)
    (tmp_path / "default").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    found = Workspace("../run").settings()
    data = found.data
    assert found.space == "default"
    assert isinstance(data, str)
    assert Path(data).samefile(tmp_path / "run" / "data" / "train.jsonl")


@pytest.mark.parametrize("n_written", range(3))
def test_a_kill_while_the_search_gets_its_id_leaves_no_study_that_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_written: int
) -> None:
    """Regression: between two files the folder looked like one of an earlier version."""
    workspace = Workspace(tmp_path / "run")
    workspace.create(SearchSettings(model="m", data="d.csv", output=str(tmp_path / "run")))
    remember, left = Workspace.remember, iter(range(n_written))

    def dies(self: Workspace, name: str, value: object) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        remember(self, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "remember", dies)
        with pytest.raises(KeyboardInterrupt):
            workspace.id()
    again = Workspace(tmp_path / "run")
    assert not again.has_study()
    assert len(again.id()) == 8
    assert not again.has_study()
