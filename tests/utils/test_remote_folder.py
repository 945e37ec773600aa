"""A folder behind a URL: copied there and back, whole, and only what changed."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import fsspec
import pytest

from autopeft.errors import StorageError
from autopeft.utils.folder_lock import FolderLock
from autopeft.utils.remote_folder import RemoteFolder


@pytest.fixture(params=["file", "memory"])
def url(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    monkeypatch.setenv("HOME", str(tmp_path / "first"))
    yield f"file://{tmp_path}/there/run" if request.param == "file" else "memory://there/run"
    fsspec.filesystem("memory").store.clear()


def written(folder: RemoteFolder, **files: str) -> None:
    for name, text in files.items():
        path = folder.local / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_another_machine_finds_all_of_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = RemoteFolder(url)
    written(here, settings="a", state__plan="b")
    here.push()
    written(here, settings="longer")
    (here.local / "state" / "plan").unlink()
    written(here, adapters__one="c")
    here.push()
    monkeypatch.setenv("HOME", str(here.local.parent / "second"))
    there = RemoteFolder(url)
    there.pull()
    assert there.names() == ("adapters/one", "settings")
    assert (there.local / "settings").read_text() == "longer"
    assert (there.local / "adapters" / "one").read_text() == "c"
    assert not (there.local / "state").exists()


def test_the_newer_copy_wins(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = RemoteFolder(url)
    written(here, settings="a")
    here.push()
    written(here, settings="not pushed")
    here.pull()  # What is there is no newer.
    assert (here.local / "settings").read_text() == "not pushed"
    with monkeypatch.context() as other:
        other.setenv("HOME", str(here.local.parent / "second"))
        there = RemoteFolder(url)
        there.pull()
        written(there, settings="b")
        there.push()
    here.pull()
    assert (here.local / "settings").read_text() == "b"


def test_a_database_is_copied_as_of_one_moment_and_locks_are_not(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = RemoteFolder(url)
    here.local.mkdir(parents=True)
    lock = FolderLock(here.local)
    with closing(sqlite3.connect(here.local / "study.db")) as database:
        database.execute("create table trials (number)")
        database.commit()
        database.execute("insert into trials values (1)")  # Not committed.
        here.push()
    lock.release()
    assert here.names() == ("study.db",)
    monkeypatch.setenv("HOME", str(here.local.parent / "second"))
    there = RemoteFolder(url)
    there.pull()
    with closing(sqlite3.connect(there.local / "study.db")) as database:
        assert database.execute("select count(*) from trials").fetchone() == (0,)


@pytest.mark.parametrize("url", ["nothing://bucket/run", "s3://bucket/run"])
def test_an_unknown_file_system_is_one_line(url: str) -> None:
    with pytest.raises(StorageError, match="use a folder"):
        RemoteFolder(url)


def test_what_cannot_be_written_names_the_copy_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("")
    folder = RemoteFolder(f"file://{tmp_path}/file/run")
    written(folder, settings="a")
    with pytest.raises(StorageError, match=str(folder.local)):
        folder.push()
