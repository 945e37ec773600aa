"""What folders hold, and which rows a run may have seen."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autopeft.comparing.sources import Source, find_sources, is_same_base
from autopeft.errors import AdapterError, UserError
from autopeft.result import SearchResult
from autopeft.settings import SearchSettings


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was searched on rows.csv and validated on held.csv, with one member."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows.csv", "held.csv", "other.csv"):
        (tmp_path / name).touch()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "front.json").touch()
    text = f"model: m\ndata: {tmp_path}/rows.csv\nvalidation: held.csv\nseed: 3\n"
    (folder / "settings.yaml").write_text(text)
    member = SimpleNamespace(digest="0123456789", folder=folder / "adapters" / "one")
    result = SimpleNamespace(front=[member], pick=lambda _: member)
    monkeypatch.setattr(SearchResult, "read", lambda _: result)
    return folder


def _note(run: Path, **settings: Any) -> str:
    given = {"data": "rows.csv", "validation": "held.csv", "seed": 3, **settings}
    (source,) = find_sources([run], "best", SearchSettings(model="m", **given))
    return source.note


def test_one_file_is_one_however_its_path_is_written(run: Path) -> None:
    (run.parent / "link.csv").symlink_to("rows.csv")
    for data in ("rows.csv", "./rows.csv", "link.csv", str(run.parent / "rows.csv")):
        assert not _note(run, data=data)


@pytest.mark.parametrize(
    ("name", "value"), [("data", "other.csv"), ("seed", 4), ("validation", None), ("test", "t.csv")]
)
def test_a_run_that_split_its_rows_in_another_way_is_told(name: str, value: Any, run: Path) -> None:
    assert f"searched with another {name}: it may have seen" in _note(run, **{name: value})


def test_rows_that_a_run_has_seen_are_not_held_out(run: Path) -> None:
    for data, name in (("./rows.csv", "data"), ("held.csv", "validation")):
        settings = SearchSettings(model="m", data=data)
        with pytest.raises(UserError, match=rf"is the {name} of .*run, .*leave out --held-out"):
            find_sources([run], "best", settings, is_held_out=True)
    settings = SearchSettings(model="m", data="other.csv")
    (source,) = find_sources([run], "best", settings, is_held_out=True)
    assert not source.note


def test_two_models_of_one_name_are_two(tiny_model: Path, tiny_llama: Path, tmp_path: Path) -> None:
    for name, model in (("a", tiny_model), ("b", tiny_model), ("c", tiny_llama)):
        shutil.copytree(model, tmp_path / name / "base")
    a, b, c = (str(tmp_path / name / "base") for name in "abc")
    assert is_same_base(a, b)
    assert not is_same_base(a, c)
    assert is_same_base("elsewhere/base", c)


def _folder(place: Path, *names: str) -> Path:
    """A folder with files by name; each has as many bytes as there are letters in its name."""
    for name in names:
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}" if path.suffix == ".json" else "x" * len(name))
    return place


def _sources(*folders: Path) -> tuple[Source, ...]:
    return find_sources(folders, "best", SearchSettings(model="m", data="d"))


def test_no_two_have_one_name_and_none_has_that_of_the_base_model(tmp_path: Path) -> None:
    names = [f"{each}/adapter_config.json" for each in ("no adapter", "x/a", "x/a (2)", "y/x/a")]
    _folder(tmp_path, *names)
    a, b = tmp_path / "x" / "a", tmp_path / "y" / "x" / "a"
    found = _sources(tmp_path / "no adapter", a, b, a, tmp_path / "x" / "a (2)")
    told = [source.name for source in found]
    assert told == ["no adapter (2)", "x/a", "x/a (2)", "x/a (3)", "a (2)"]
    assert [source.folder for source in found][1:4] == [a, b, a]


@pytest.mark.parametrize(
    ("own", "beside"),
    [
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            ["checkpoint-10/adapter_config.json", "checkpoint-10/adapter_model.safetensors"],
        ),
        (
            ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            ["checkpoint-10/model.safetensors", "adapter_model.safetensors"],
        ),
        (
            ["head.safetensors", "part-0-lora/adapter_model.safetensors"],
            ["gguf/adapter_model.safetensors", "part-0-lora/old/adapter_model.safetensors"],
        ),
    ],
)
def test_the_size_is_that_of_what_is_scored(
    own: list[str], beside: list[str], tmp_path: Path
) -> None:
    _folder(tmp_path, *own, *beside)
    if "head.safetensors" in own:
        (tmp_path / "plan.json").write_text('{"auto_class": "AutoModel"}')
    (source,) = _sources(tmp_path)
    assert source.n_bytes == sum(len(name) for name in own if name.endswith("safetensors"))


def test_a_plan_of_another_program_makes_no_adapter_autopefts(tmp_path: Path) -> None:
    _folder(tmp_path, "adapter_config.json")
    kinds = {
        '{"my": "notes"}': "peft",
        '{"plan": ["read", "write"]}': "peft",
        "[1]": "autopeft",
        '{"plan": [], "role_map": {}}': "autopeft",
        '{"plan": [{"lay': "autopeft",
    }
    for text, kind in kinds.items():
        (tmp_path / "plan.json").write_text(text)
        (source,) = _sources(tmp_path)
        assert source.kind == kind, text
    (tmp_path / "plan.json").write_text('{"my": "notes"}')
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="holds no adapter and no model"):
        _sources(tmp_path)


def test_further_adapters_in_a_folder_are_told(tmp_path: Path) -> None:
    _folder(tmp_path, "a/adapter_config.json", "a/two/adapter_config.json")
    _folder(tmp_path, "b/one/adapter_config.json", "b/two/adapter_config.json")
    (source,) = _sources(tmp_path / "a")
    assert source.note == "the adapters in its folders two are not compared"
    with pytest.raises(AdapterError, match=r"name one of those in it: .*b/one, .*b/two$"):
        _sources(tmp_path / "b")
    with pytest.raises(AdapterError, match=r"adapter_config\.json': is no folder"):
        _sources(tmp_path / "a" / "adapter_config.json")
