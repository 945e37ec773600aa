"""One process at a time uses a folder, and the others learn which one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from autopeft.errors import StorageError
from autopeft.utils import folder_lock
from autopeft.utils.files import replaced_folder, write_text
from autopeft.utils.folder_lock import FolderLock, Holder, is_of_lock
from autopeft.utils.serialize import strict_json

_HOLDS = """
import sys, time
from pathlib import Path
from autopeft.utils.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
"""


def test_a_held_folder_is_refused_and_its_holder_named(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            with pytest.raises(StorageError, match=rf"process {process.pid} on .+ since 20"):
                FolderLock(tmp_path)
        finally:
            process.kill()
    # A killed process holds nothing.
    assert any(map(is_of_lock, tmp_path.iterdir()))
    FolderLock(tmp_path).release()


def test_two_searches_of_one_process_are_two(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(StorageError, match=f"process {os.getpid()} "):
        FolderLock(tmp_path / "link")
    lock.release()
    FolderLock(tmp_path / "link").release()


def test_an_unused_lock_leaves_nothing(tmp_path: Path) -> None:
    FolderLock(tmp_path / "runs" / "first").release(is_unused=True)
    assert not list(tmp_path.iterdir())


def test_an_unused_lock_leaves_the_files_of_others(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "run")
    (tmp_path / "run" / "thesis.tex").write_text("x")
    lock.release(is_unused=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no locks."""

    class NoLock:
        def __init__(self, path: Path) -> None:
            pass

        def acquire(self, timeout: float) -> None:
            raise NotImplementedError

        def release(self) -> None:
            pass

    monkeypatch.setattr(folder_lock, "FileLock", NoLock)
    monkeypatch.setattr(folder_lock, "WATCH_SECONDS", 0.3)


def _write(folder: Path, holder: Holder) -> None:
    (folder / ".holder.json").write_text(strict_json(holder))


@pytest.mark.usefixtures("without_locks")
def test_without_locks_the_heartbeat_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = replace(Holder.here(), host="other", pid=7)
    _write(tmp_path, replace(last, heartbeat=time.time() - 100))
    FolderLock(tmp_path)  # Not heard of for long.
    _write(tmp_path, last)
    FolderLock(tmp_path)  # Silent while it is watched: killed just now.
    _write(tmp_path, last)
    sleep = time.sleep

    def beat(seconds: float) -> None:
        sleep(seconds)
        _write(tmp_path, replace(last, heartbeat=time.time()))

    monkeypatch.setattr(time, "sleep", beat)
    with pytest.raises(StorageError, match="process 7 on other since"):
        FolderLock(tmp_path)


def test_a_damaged_record_blocks_nobody(tmp_path: Path) -> None:
    (tmp_path / ".holder.json").write_text("{")
    lock = FolderLock(tmp_path)
    assert json.loads((tmp_path / ".holder.json").read_text())["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / ".holder.json").exists()


def test_a_folder_that_cannot_be_made_is_one_line() -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        FolderLock(Path("/proc/no/run"))


@pytest.mark.parametrize("change", ["removed", "moved", "linked elsewhere"])
def test_a_held_folder_that_is_gone_is_not_made_again(change: str, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    lock = FolderLock(folder)
    if change == "removed":
        shutil.rmtree(folder)
    else:
        folder.rename(elsewhere)
    if change == "linked elsewhere":
        (tmp_path / "other").mkdir()
        folder.symlink_to("other")

    def publish() -> None:
        with replaced_folder(folder / "adapters" / "one"):
            pass

    state = folder / "state" / "spent.json"
    for write in (lock.beat, lambda: write_text(state, "{}"), publish):
        with pytest.raises(StorageError, match="run': was removed or moved in the meantime"):
            write()
    assert not (folder / "state").exists()
    assert not (folder / "adapters").exists()
    lock.release()
    write_text(state, "{}")
