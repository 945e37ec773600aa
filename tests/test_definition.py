"""A search goes on with the settings that define it, whatever its settings file says meanwhile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import autopeft
from autopeft.definition import check_unchanged
from autopeft.errors import SettingsError, StorageError
from autopeft.inputs import Inputs
from autopeft.settings import SearchSettings
from autopeft.workspace import Workspace

BEGUN = SearchSettings(
    model="m",
    data="d.csv",
    steps=6,
    batch_size=4,
    rungs=2,
    precision="fp32",
    space={"methods": {"lora": {"ranks": [2, 4]}}, "layers": "last:4"},
)
"""Settings as they are written: with the sizes that were planned."""


def edit(folder: Path, **changes: Any) -> None:
    """Change settings in a search's file, as a user's editor does."""
    path = folder / "settings.yaml"
    rows = {**yaml.safe_load(path.read_text()), **changes}
    path.write_text(yaml.safe_dump(rows, sort_keys=False))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A search that was begun."""
    found = Workspace(tmp_path / "run")
    found.create(BEGUN)
    return found


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("steps", 9, "steps=9: the search was begun with 6"),
        ("steps", None, "steps=None: the search was begun with 6"),
        ("batch_size", 8, "batch_size=8: the search was begun with 4"),
        ("rungs", 3, "rungs=3: the search was begun with 2"),
        ("seed", 7, "seed=7: the search was begun with 0"),
        ("objectives", ["peak_memory_bytes"], "begun with ['trainable_params']"),
        ("constraints", ["trainable_params<=500"], "begun with []"),
        (
            "space",
            {"methods": {"lora": {"ranks": [2, 4, 8]}}, "layers": "last:4"},
            "space.methods.lora.ranks=[2, 4, 8]: the search was begun with [2, 4]",
        ),
        ("space", {"methods": {"lora": {"ranks": [2, 4]}}}, "space.layers=None: "),
        ("space", "encoder", "space='encoder': "),
        ("max_length", 8, "begun with None"),
        ("on_long", "drop", "begun with 'cut'"),
        ("precision", "bf16", "begun with 'fp32'"),
        ("quantization", "torchao-int8", "begun with 'none'"),
        ("optimizer", "adamw_8bit", "begun with 'adamw'"),
        ("eta", 2, "begun with 3"),
        ("sampler", "random", "begun with 'autopeft'"),
        ("pruner", "none", "begun with 'gap'"),
        ("audit_share", 0.5, "begun with 0.05"),
        ("warm_start", "runs/first", "begun with None"),
        ("prior", "prior.json", "begun with None"),
        ("retain", "text.txt", "begun with None"),
        ("also", ["squad.yaml"], "begun with []"),
        ("validation", "v.csv", "begun with None"),
        ("model", "org/other", "begun with 'm'"),
    ],
)
def test_what_defines_the_search_cannot_be_edited(
    name: str, value: Any, shown: str, workspace: Workspace
) -> None:
    """Regression: trials of 3 and of 6 steps were on one front, with no word (issue 18)."""
    edit(workspace.folder, **{name: value})
    with pytest.raises(SettingsError) as refused:
        workspace.check_unedited()
    text = str(refused.value)
    assert shown in text
    assert f"put it back in {workspace.folder / 'settings.yaml'}, or begin a new search" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("budget", "2h"),
        ("workers", 3),
        ("confirm_seeds", 2),
        ("confirm_share", None),
        ("pick", "knee"),
        ("report_to", ["tensorboard"]),
        ("storage", "moved.db"),
        ("data", "moved/d.csv"),
        ("max_data_gb", 20),
        ("activation_cache", False),
    ],
)
def test_what_may_change_may_be_edited(name: str, value: Any, workspace: Workspace) -> None:
    edit(workspace.folder, **{name: value})
    workspace.check_unedited()


def test_a_model_may_move_where_its_digest_is_compared(
    workspace: Workspace, tmp_path: Path
) -> None:
    workspace.remember("inputs", Inputs(model="digest"))
    (tmp_path / "moved").mkdir()
    edit(workspace.folder, model=str(tmp_path / "moved"))
    workspace.check_unedited()
    edit(workspace.folder, model="org/other")
    with pytest.raises(SettingsError, match="model='org/other': the search was begun with 'm'"):
        workspace.check_unedited()


def test_settings_are_compared_by_what_they_say() -> None:
    """A list is a tuple's plain form, and the order of keys means nothing."""
    turned = {"layers": "last:4", "methods": {"lora": {"ranks": [2, 4]}}}
    now = replace(BEGUN, space=turned, objectives=("trainable_params",))
    check_unchanged(BEGUN, now, file="settings.yaml", is_digested=False)


def test_a_line_that_is_left_out_stands_for_the_default(workspace: Workspace) -> None:
    path = workspace.folder / "settings.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(("eta:", "seed:"))))
    workspace.check_unedited()


def test_a_damaged_record_is_named(workspace: Workspace) -> None:
    record = workspace.folder / "state" / "definition.json"
    for text in ("[]", "null", '{"steps": "x"}', '{"steps": [1], "nope": 2}'):
        record.write_text(text)
        with pytest.raises(StorageError, match=r"definition.json.*delete it") as refused:
            workspace.check_unedited()
        assert "\n" not in str(refused.value)


def test_a_resume_takes_no_edited_settings(workspace: Workspace) -> None:
    edit(workspace.folder, steps=24)
    before = {p: p.read_bytes() for p in workspace.folder.rglob("*.*") if p.is_file()}
    with pytest.raises(SettingsError, match="steps=24: the search was begun with 6"):
        autopeft.resume(workspace.folder, budget="5trials", progress=False)
    (workspace.folder / ".lock").unlink()
    assert {p: p.read_bytes() for p in workspace.folder.rglob("*.*") if p.is_file()} == before


def test_a_run_of_an_earlier_version_is_not_compared(workspace: Workspace) -> None:
    (workspace.folder / "state" / "definition.json").unlink()
    edit(workspace.folder, steps=24)
    workspace.check_unedited()
