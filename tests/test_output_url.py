"""`--output URL`: one search at a time, on whatever machine, and only its own files."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner
from stand_in import SHORT, Held, trained

import autopeft
from autopeft import cli, workspace
from autopeft.errors import StorageError
from autopeft.utils import remote_lock
from autopeft.utils.remote_files import RemoteFiles
from autopeft.workspace import Workspace


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Go to a machine, which has a home of its own."""
    monkeypatch.setattr(remote_lock, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(remote_lock, "WATCH_SECONDS", 30.0)
    monkeypatch.setattr("autopeft.utils.remote_folder.BEAT_SECONDS", 0.05)

    def go_to(name: str) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / name))

    go_to("first")
    return go_to


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    is_memory = getattr(request, "param", "") == "memory"
    yield "memory://there/run" if is_memory else f"file://{tmp_path}/there/run"
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


in_memory = pytest.mark.parametrize("url", ["memory"], indirect=True)
in_both = pytest.mark.parametrize("url", ["file", "memory"], indirect=True)


@pytest.fixture
def search(tiny_model: Path) -> Callable[..., Any]:
    def run(url: str, **changed: Any) -> Any:
        asked = {"model": str(tiny_model), "evaluate": trained, "output": url, **SHORT, **changed}
        return autopeft.search(**asked)

    return run


@in_both
@pytest.mark.usefixtures("machine")
def test_a_folder_that_is_not_empty_is_refused_and_left_as_it_is(
    url: str, search: Callable[..., Any]
) -> None:
    """Regression: all files of others in it were deleted, without a word."""
    fs = fsspec.core.url_to_fs(url)[0]
    fs.makedirs(f"{url}/thesis", exist_ok=True)
    fs.pipe_file(f"{url}/thesis/text.md", b"mine")
    with pytest.raises(StorageError, match="the folder is not empty; choose another --output"):
        search(url)
    assert RemoteFiles(url).names() == ("thesis/text.md",)
    assert not Workspace(url).folder.exists()


def test_a_search_is_alone_at_its_url(
    url: str,
    search: Callable[..., Any],
    machine: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Regression: both trained the same trials, and the last copy won."""
    monkeypatch.setattr(workspace, "PUSH_SECONDS", 0.2)
    held, errors = Held(), []

    def first() -> None:
        try:
            search(url, evaluate=held)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert held.began.wait(100), errors
        while "settings.yaml" not in RemoteFiles(url).names():
            assert thread.is_alive(), errors
            time.sleep(0.02)
        machine("second")
        running = rf"is in use by process {os.getpid()} on .+ since"
        with pytest.raises(StorageError, match=f"holds another search|{running}"):
            search(url)
        while not Workspace(url).folder.exists():  # The first copy is whole.
            time.sleep(0.02)
        with pytest.raises(StorageError, match=running):
            autopeft.resume(url, evaluate=trained, progress=False)
        with pytest.raises(StorageError, match=running):
            autopeft.export(url, score=True, to="out")
    finally:
        held.may_go_on.set()
        thread.join(100)
    assert not errors
    assert ".owner.json" not in RemoteFiles(url).names()
    # Another home on the same machine sees no copy, which would be another search.
    before = Workspace(url).recall("id", str)
    resumed = autopeft.resume(url, evaluate=trained, progress=False, budget="4trials")
    assert resumed.view.trials["complete"] == 4
    assert Workspace(url).recall("id", str) == before


def test_a_copy_of_a_search_that_is_not_there_any_more(
    url: str, search: Callable[..., Any], machine: Callable[[str], None]
) -> None:
    """Regression: it replaced the search that is there now, or was told to be there."""
    fs = fsspec.core.url_to_fs(url)[0]
    old = search(url).folder
    fs.rm(url, recursive=True)
    with pytest.raises(StorageError, match=r"holds nothing, but .* is the copy of a search"):
        search(url)
    told = autopeft.resume(url, evaluate=trained, progress=False).view.warnings
    assert any("is put there" in line for line in told)
    assert "front.json" in RemoteFiles(url).names()
    # It is not put among files of others.
    fs.rm(url, recursive=True)
    fs.makedirs(url, exist_ok=True)
    fs.pipe_file(f"{url}/front.json", b"mine")
    with pytest.raises(StorageError, match="is not empty and holds no copy of the search"):
        autopeft.resume(url, evaluate=trained, progress=False)
    assert RemoteFiles(url).names() == ("front.json",)
    # Nor over another search.
    fs.rm(url, recursive=True)
    machine("second")
    now = search(url, seed=5).folder
    machine("first")
    ids = [json.loads((folder / "state" / "id.json").read_text()) for folder in (now, old)]
    both = f"holds the search {ids[0]}, and its copy here, .*, is of the search {ids[1]}; move"
    for command in (autopeft.report, autopeft.resume, search):
        with pytest.raises(StorageError, match=both):
            command(url)
    assert old.exists()
    shutil.rmtree(old)
    assert autopeft.report(url).view == autopeft.SearchResult.read(now).view


@pytest.mark.usefixtures("machine")
def test_a_url_that_cannot_be_written_is_told_before_any_training(
    tmp_path: Path, search: Callable[..., Any]
) -> None:
    """Regression: it was told after the last trial."""
    (tmp_path / "file").touch()
    for url in (f"file://{tmp_path}/file/run", "file:///proc/x/run"):
        with pytest.raises(StorageError, match="cannot be"):
            search(url, evaluate=lambda *_, **__: pytest.fail("it was trained"))
        assert not (tmp_path / "first" / ".cache" / "autopeft" / "runs").exists()


@in_memory
@pytest.mark.usefixtures("machine")
def test_a_failed_copy_is_told_once_and_tried_again(
    url: str, search: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: nobody heard of it before the end."""
    monkeypatch.setattr(workspace, "PUSH_SECONDS", 0.02)
    is_away, failed, write = threading.Event(), [], RemoteFiles.write

    def failing(self: RemoteFiles, name: str, content: bytes) -> None:
        if name == ".copies.json" and is_away.is_set():
            failed.append(name)
            raise ConnectionError("no route to host")
        write(self, name, content)

    monkeypatch.setattr(RemoteFiles, "write", failing)

    def evaluate(candidate: Any, *, seed: int, report: Any) -> Any:
        before = len(failed)
        is_away.set()
        while len(failed) < before + 2:
            time.sleep(0.02)
        is_away.clear()
        return trained(candidate, seed=seed, report=report)

    told: list[str] = []

    class Heard(autopeft.Callback):
        def on_message(self, text: str) -> None:
            told.append(text)

    result = search(url, evaluate=evaluate, callbacks=[Heard()])
    for lines in (told, result.view.warnings):
        (line,) = [line for line in lines if "not copied" in line]
        assert "no route to host" in line
    assert "front.json" in RemoteFiles(url).names()


@in_memory
@pytest.mark.usefixtures("machine")
def test_the_last_lines_name_the_url(
    url: str, search: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: they named the copy, which is on this machine alone."""
    result = search(url)
    assert result.url == result.place == url
    for command in ("report", "resume"):
        with warnings.catch_warnings():
            monkeypatch.setattr(autopeft.api, "resume", lambda folder, **_: result)
            output = CliRunner().invoke(cli.app, [command, url]).output
        assert f"report: {url}/report.html" in output.replace("\n", "")
        assert f"autopeft export {url} --pick best" in output.replace("\n", "")
        assert str(result.folder) not in output.replace("\n", "")


@in_both
@pytest.mark.usefixtures("machine")
def test_a_mistake_that_is_found_late_leaves_nothing_there(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "PUSH_SECONDS", 0.01)
    place = Workspace(url)
    with place.held(is_new=True):
        place.create(autopeft.SearchSettings())
        place.id()
        while "settings.yaml" not in RemoteFiles(url).names():
            time.sleep(0.02)
        place.discard()
    assert not RemoteFiles(url).names()
    assert not place.folder.exists()
    assert not (tmp_path / "there").exists()
