from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autopeft.errors import AdapterError, SettingsError, StorageError
from autopeft.utils.arguments import (
    checked_count,
    checked_folder,
    checked_path,
    checked_target,
    checked_text,
)


class Nameless:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (5, "folder=5: is no path"),
        (None, "folder=None: is no path"),
        (b"runs", "folder=b'runs': is no path"),
        (["runs"], "folder=['runs']: is no path"),
        (np.zeros(99), "folder='ndarray': is no path"),
        (Nameless(), "folder='Nameless': is no path"),
        ("", "folder='': is empty"),
        ("a\x00b", "holds a NUL character"),
        ("\ud800", "holds half a character"),
        ("a" * 300, "is longer than any path or name of a file"),
        ("nowhere/" + "ä" * 200, "is longer than any path or name of a file"),
        ("a/" * 3000, "is longer than any path"),
        ("~nobody-of-this-name/runs", "names a user who is not known here"),
    ],
)
def test_what_is_no_path_is_one_line(value: Any, told: str) -> None:
    for check in (checked_path, checked_folder, checked_target):
        with pytest.raises(StorageError, match=re.escape(told)) as caught:
            check("folder", value)
        assert len(str(caught.value)) < 300


def test_a_link_to_itself_is_one_line(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (loop, loop / "runs"):
        with pytest.raises(AdapterError, match=r"folder=.*loop.*: is a link that leads to itself"):
            checked_path("folder", path, error=AdapterError)


def test_paths_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checked_path("folder", "~/runs") == tmp_path / "runs"
    assert checked_path("folder", Path("runs")) == Path("runs")
    assert checked_folder("folder", "s3://bucket/runs") == "s3://bucket/runs"
    assert checked_target("to", tmp_path / "a" / "b") == tmp_path / "a" / "b"


def test_a_place_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for parent in ("file", "gone"):
        with pytest.raises(StorageError, match=f"to=.*{parent} is no folder"):
            checked_target("to", tmp_path / parent / "x")
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(StorageError, match="is not writable"):
            checked_target("to", tmp_path / "closed" / "x")


@pytest.mark.parametrize("value", [2.5, "3", True, None, [], float("nan")])
def test_what_is_no_count_is_one_line(value: Any) -> None:
    with pytest.raises(SettingsError, match=r"rows=.*: must be a whole number; use 3"):
        checked_count("rows", value, least=1, remedy="use 3")


def test_counts_and_texts() -> None:
    assert checked_count("rows", np.int64(3), least=1, remedy="use 3") == 3
    with pytest.raises(SettingsError, match="rows=0: `rows >= 1` must hold"):
        checked_count("rows", 0, least=1, remedy="use 3")
    assert checked_text("pick", "best", "use best") == "best"
    with pytest.raises(SettingsError, match="pick=5: must be text; use best"):
        checked_text("pick", 5, "use best")
