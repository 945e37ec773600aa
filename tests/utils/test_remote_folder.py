"""A folder behind a URL: copied there and back, whole, and only what changed."""

from __future__ import annotations

import json
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
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def written(folder: RemoteFolder, **files: str) -> None:
    for name, text in files.items():
        path = folder.local / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_another_machine_finds_all_of_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = RemoteFolder(url)
    written(here, settings="a", state__plan="b")
    here.push("d1")
    written(here, settings="longer")
    (here.local / "state" / "plan").unlink()
    written(here, adapters__one="c")
    here.push("d1")
    monkeypatch.setenv("HOME", str(here.local.parent / "second"))
    there = RemoteFolder(url)
    there.pull("d1")
    assert there.names() == ("adapters/one", "settings")
    assert (there.local / "settings").read_text() == "longer"
    assert (there.local / "adapters" / "one").read_text() == "c"
    assert not (there.local / "state").exists()


def test_the_newer_copy_wins(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = RemoteFolder(url)
    written(here, settings="a")
    here.push("d1")
    written(here, settings="not pushed")
    here.pull("d1")  # What is there is no newer.
    assert (here.local / "settings").read_text() == "not pushed"
    with monkeypatch.context() as other:
        other.setenv("HOME", str(here.local.parent / "second"))
        there = RemoteFolder(url)
        there.pull("d1")
        written(there, settings="b")
        there.push("d1")
    here.pull("d1")
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
        here.push("d1")
    lock.release()
    assert here.names() == ("study.db",)
    monkeypatch.setenv("HOME", str(here.local.parent / "second"))
    there = RemoteFolder(url)
    there.pull("d1")
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
        folder.push("d1")


def test_only_what_was_copied_there_is_removed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: every file of others in the folder was deleted."""
    here, fs = RemoteFolder(url), fsspec.core.url_to_fs(url)[0]
    fs.makedirs(f"{url}/thesis", exist_ok=True)
    fs.pipe_file(f"{url}/thesis/text.md", b"mine")
    written(here, settings="a", old="b")
    here.push("d1")
    (here.local / "old").unlink()
    fs.pipe_file(f"{url}/data.csv", b"mine")
    here.push("d1")
    assert here.names() == ("data.csv", "settings", "thesis/text.md")
    # Nor are they taken for files of the search.
    monkeypatch.setenv("HOME", str(here.local.parent / "second"))
    there = RemoteFolder(url)
    there.pull(None)
    assert {path.name for path in there.local.iterdir()} == {".copies.json", "settings"}
    (there.local / "settings").unlink()
    there.push("d1")
    assert there.names() == ("data.csv", "thesis/text.md")
    there.withdraw()
    assert there.names() == ("data.csv", "thesis/text.md")


def test_a_damaged_list_leads_nowhere_else(url: str) -> None:
    """What is behind a URL is of others."""
    here, fs = RemoteFolder(url), fsspec.core.url_to_fs(url)[0]
    above = url.rpartition("/")[0]
    fs.makedirs(url, exist_ok=True)
    fs.pipe_file(f"{above}/other", b"mine")
    listed = {"count": 1, "search": "d1", "token": "t", "files": ["../other", "gone"]}
    fs.pipe_file(f"{url}/.copies.json", json.dumps(listed).encode())
    here.pull(None)
    written(here, settings="a")
    here.push("d1")
    assert fs.cat_file(f"{above}/other") == b"mine"
    fs.pipe_file(f"{url}/.copies.json", b"{")
    with pytest.raises(StorageError, match="cannot be read"):
        here.pull("d1")


def test_a_stale_copy_does_not_replace_another_search(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the copies were counted, and those of the old search were more."""
    here, fs = RemoteFolder(url), fsspec.core.url_to_fs(url)[0]
    written(here, settings="a")
    for _ in range(3):
        here.push("d1")
    fs.rm(url, recursive=True)
    with monkeypatch.context() as other:
        other.setenv("HOME", str(here.local.parent / "second"))
        there = RemoteFolder(url)
        written(there, settings="b")
        there.push("e2")
    both = "the search e2.* search d1|search e2 by now, and this one is d1"
    for stale in (here, RemoteFolder(url)):
        with pytest.raises(StorageError, match=both):
            stale.pull("d1")
        with pytest.raises(StorageError, match=both):
            stale.push("d1")
    assert (here.local / "settings").read_text() == "a"
    there.push("e2")


def test_a_copy_that_another_process_went_on_with_is_not_written_over(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = RemoteFolder(url)
    written(here, settings="a")
    here.push("d1")
    monkeypatch.setenv("HOME", str(here.local.parent / "second"))
    there = RemoteFolder(url)
    there.pull(None)
    there.push("d1")
    with pytest.raises(StorageError, match="another process has gone on with this search"):
        here.push("d1")
    here.pull("d1")
    here.push("d1")


def test_what_was_emptied_is_put_there_whole(url: str) -> None:
    here, fs = RemoteFolder(url), fsspec.core.url_to_fs(url)[0]
    written(here, settings="a", front="b")
    here.push("d1")
    fs.rm(url, recursive=True)
    assert not here.has_copy()
    assert here.is_empty()
    here.pull("d1")
    written(here, front="new")
    here.push("d1")
    assert here.names() == ("front", "settings")


def test_a_copy_of_an_earlier_version_is_taken_and_kept(url: str) -> None:
    here, fs = RemoteFolder(url), fsspec.core.url_to_fs(url)[0]
    for name, text in {"settings": "a", "state/id.json": '"d1"', ".copies.json": "2"}.items():
        fs.makedirs(f"{url}/{name}".rpartition("/")[0], exist_ok=True)
        fs.pipe_file(f"{url}/{name}", text.encode())
    with pytest.raises(StorageError, match="holds the search d1"):
        here.pull("e2")
    here.pull(None)
    assert (here.local / "settings").read_text() == "a"
    with pytest.raises(StorageError, match="holds the search d1 by now"):
        here.push("e2")
    here.push("d1")
    (here.local / "settings").unlink()
    here.push("d1")
    assert here.names() == ("state/id.json",)


def test_what_a_process_here_works_on_is_not_replaced(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = RemoteFolder(url)
    written(here, settings="a")
    here.push("d1")
    with monkeypatch.context() as other:
        other.setenv("HOME", str(here.local.parent / "second"))
        there = RemoteFolder(url)
        there.pull(None)
        there.push("d1")
    written(here, settings="unsaved")
    lock = FolderLock(here.local)
    RemoteFolder(url).pull("d1")  # as `report` does
    assert (here.local / "settings").read_text() == "unsaved"
    lock.release()
    RemoteFolder(url).pull("d1")
    assert (here.local / "settings").read_text() == "a"


def test_a_kill_in_the_first_copy_leaves_nothing_that_is_nobodys(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = RemoteFolder(url)
    written(here, a="1", b="2")
    with monkeypatch.context() as killed:
        killed.setattr(RemoteFolder, "_note", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            here.push("d1")
    (here.local / "b").unlink()
    again = RemoteFolder(url)
    again.pull("d1")  # What is not whole there is not taken.
    again.push("d1")
    assert again.names() == ("a",)
