"""Files are replaced whole or left as they were."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from autopeft.errors import StorageError
from autopeft.utils.files import contained, replaced_folder, write_text


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "front.json"
    write_text(path, "old")

    def fail(source: str, target: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(StorageError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["front.json"]


def test_folders_are_created_and_text_is_always_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b.txt", "caf\u00e9 \ud800")
    assert (tmp_path / "a" / "b.txt").read_text(encoding="utf-8") == "caf\u00e9 ?"


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "adapter"
    for content in ("first", "second"):
        with replaced_folder(target) as draft:
            (draft / "inner").mkdir()
            (draft / "inner" / f"{content}.txt").write_text(content)
    assert [path.name for path in target.rglob("*.txt")] == ["second.txt"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "old.txt").write_text("old")

    def fail() -> None:
        with replaced_folder(target) as draft:
            (draft / "new.txt").write_text("new")
            raise OSError("disk full")

    with pytest.raises(StorageError, match="disk full"):
        fail()
    assert os.listdir(tmp_path) == ["adapter"]
    assert os.listdir(target) == ["old.txt"]


def test_a_link_does_not_lead_out_of_a_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "run", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "plots").symlink_to(outside)
    (folder / "round").symlink_to(folder / "round")
    (folder / "near").symlink_to(folder / "adapters")
    (tmp_path / "linked").symlink_to(folder)
    for name in ("plots", "round", "../outside", outside):
        with pytest.raises(StorageError, match="leads out of"):
            contained(folder, name)
    assert contained(folder, "near/a") == folder / "near/a"
    assert contained(tmp_path / "linked", "new") == tmp_path / "linked" / "new"
