"""Files are replaced whole or left as they were."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from autopeft.errors import StorageError
from autopeft.utils.files import contained, remove_drafts, replaced_folder, write_text


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


_DIES = """
import os, sys
from pathlib import Path
from autopeft.utils.files import replaced_folder, write_bytes
os.replace = lambda *_: os._exit(9)  # as if killed
if sys.argv[2] == "file":
    write_bytes(Path(sys.argv[1]), b"new")
with replaced_folder(Path(sys.argv[1])) as draft:
    (draft / "weights").touch()
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_had_begun_to_write_is_removed(tmp_path: Path, kind: str) -> None:
    """Regression: it stayed in the run folder for ever."""
    place = tmp_path / "state" / "spent.json"
    dies = [sys.executable, "-c", _DIES, str(place), kind]
    assert subprocess.run(dies, check=False).returncode == 9
    left = next(path for path in place.parent.iterdir() if not path.name.endswith(".lock.draft"))
    for kept in (place.parent / ".notes", tmp_path / "notes.draft"):
        kept.touch()
    remove_drafts(tmp_path, "spent.json")
    assert left.exists()
    remove_drafts(tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {"state", ".notes", "notes.draft"}


def test_what_a_killed_export_left_goes_with_the_next_and_what_another_writes_stays(
    tmp_path: Path,
) -> None:
    """Regression: a draft stayed beside the target for good."""
    target = tmp_path / "out[1]"
    dies = [sys.executable, "-c", _DIES, str(target), "folder"]
    with replaced_folder(target) as draft:
        (draft / "weights").touch()
        before = set(tmp_path.iterdir())
        assert subprocess.run(dies, check=False).returncode == 9
        assert len(set(tmp_path.iterdir()) - before) == 2  # a draft and its lock
        with replaced_folder(tmp_path / "other"):
            pass
        with replaced_folder(target) as second:
            (second / "weights").touch()
        assert set(tmp_path.iterdir()) == before | {target, tmp_path / "other"}
        assert (draft / "weights").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out[1]", "other"}


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


def test_a_copy_that_meets_a_full_disk_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: `make it writable`, after a list of tuples (issue 18)."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x").write_text("x")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    def copy() -> None:
        with replaced_folder(tmp_path / "b") as draft:
            shutil.copytree(tmp_path / "a", draft, dirs_exist_ok=True, copy_function=full)

    with pytest.raises(StorageError) as caught:
        copy()
    assert "cannot be written (No space left on device); make room there" in str(caught.value)
    assert not (tmp_path / "b").exists()
