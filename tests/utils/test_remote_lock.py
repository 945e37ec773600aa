"""One process uses a folder behind a URL, and the others learn which one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from autopeft.errors import StorageError
from autopeft.utils import remote_lock
from autopeft.utils.folder_lock import Holder
from autopeft.utils.remote_files import RemoteFiles
from autopeft.utils.remote_lock import RemoteLock
from autopeft.utils.timer import Timer


@pytest.fixture(params=["file", "memory"])
def url(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    monkeypatch.setattr(remote_lock, "SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(remote_lock, "WATCH_SECONDS", 0.5)
    yield f"file://{tmp_path}/run" if request.param == "file" else "memory://there/run"
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def lock_of(url: str, host: str) -> RemoteLock:
    return RemoteLock(RemoteFiles(url, is_alone=True), replace(Holder.here(), host=host))


def test_another_machine_is_refused_while_the_first_is_alive(url: str) -> None:
    first, second = lock_of(url, "first"), lock_of(url, "second")
    first.claim()
    with Timer(first.beat, 0.02), pytest.raises(StorageError, match=r"in use by .* on first since"):
        second.claim()
    second.release()  # It removes its own alone.
    assert RemoteFiles(url).names()
    first.release()
    assert not RemoteFiles(url).names()
    second.claim()
    second.release()


def test_one_that_is_silent_is_dead_whatever_the_clocks_say(url: str) -> None:
    ahead = replace(Holder.here(), host="first", heartbeat=time.time() + 1e6)
    killed = RemoteLock(RemoteFiles(url), ahead)
    killed.claim()
    second = lock_of(url, "second")
    second.claim()
    # It was not dead, but stopped: it does not write over the other one.
    killed.beat()
    with pytest.raises(StorageError, match="on second since"):
        killed.check()
    second.beat()
    second.check()
    killed.release()
    assert RemoteFiles(url).names()


def test_one_that_is_known_to_have_ended_is_not_watched(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = Holder.here()
    RemoteLock(RemoteFiles(url), former).claim()
    monkeypatch.setattr(remote_lock, "lives", lambda *_, **__: pytest.fail("it was watched"))
    lock_of(url, "second").claim(former)


def test_of_two_at_once_one_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both see nobody, and then write."""
    both, taken, refused = threading.Barrier(2), [], []

    class Late(RemoteFiles):
        def write(self, name: str, content: bytes) -> None:
            both.wait(30)
            super().write(name, content)

    def claim(host: str) -> None:
        lock = RemoteLock(Late(url, is_alone=True), replace(Holder.here(), host=host))
        try:
            lock.claim()
            taken.append(host)
        except StorageError:
            refused.append(host)

    threads = [threading.Thread(target=claim, args=(host,)) for host in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(taken) == len(refused) == 1


def test_a_late_heartbeat_leaves_nothing(url: str) -> None:
    lock = lock_of(url, "first")
    lock.claim()
    lock.release()
    lock.beat()
    assert not RemoteFiles(url).names()


def test_where_nothing_can_be_written_one_line_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be"):
        lock_of(f"file://{tmp_path}/file/run", "first").claim()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_where_nothing_can_be_removed_the_end_is_written(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    first = lock_of(url, "first")
    first.claim()
    monkeypatch.setattr(RemoteFiles, "remove", refuse)
    first.release()
    monkeypatch.setattr(remote_lock, "WATCH_SECONDS", 100.0)  # It need not be watched.
    lock_of(url, "second").claim()
