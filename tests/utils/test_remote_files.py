"""A URL names a folder, and what is written there is whole."""

from __future__ import annotations

from pathlib import Path

import fsspec.implementations.local
import pytest

from autopeft.errors import StorageError
from autopeft.utils.remote_files import RemoteFiles, check_no_url, is_inside


@pytest.mark.parametrize(
    "url",
    [
        *("file://", "file:///", "local://", "memory://", "memory:///", "s3://", "://x"),
        *("s3://bucket", "s3://bucket/", "gs://bucket", "abfs://container", "file://runs/first"),
    ],
)
def test_a_url_without_a_folder_is_refused_with_the_remedy(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the current folder was meant by `file://`, and `://x` was a folder's name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        StorageError, match=r"name a folder in it|give file:///full/path"
    ) as refused:
        RemoteFiles(url)
    assert refused.value.value == url
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["file:", "s3:/bucket/run", "memory:"])
def test_a_url_that_lost_its_slashes_is_no_folder(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match=f"begins with {path.partition(':')[0]}://"):
        check_no_url(path)
    Path(path).mkdir(parents=True)
    check_no_url(path)  # There is such a folder.
    for other in ("runs/first", "C:/runs", "run:1", "nothing:/run"):
        check_no_url(other)


def test_what_is_written_is_whole_or_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a kill left half of study.db at the URL."""
    files, here = RemoteFiles(f"file://{tmp_path}/run"), tmp_path / "new"
    files.write("study.db", b"old")
    here.write_bytes(b"new")

    def killed(self: object, path: str, target: str) -> None:
        Path(target).write_bytes(b"n")
        raise KeyboardInterrupt

    with monkeypatch.context() as half:
        half.setattr(fsspec.implementations.local.LocalFileSystem, "put_file", killed)
        with pytest.raises(KeyboardInterrupt):
            files.put(here, "study.db")
    assert files.read("study.db") == b"old"
    assert files.names() == ("study.db",)
    files.put(here, "study.db")
    assert files.read("study.db") == b"new"


def test_folders_that_were_made_for_nothing_are_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    files = RemoteFiles(f"file://{tmp_path}/mine/a/b")
    files.write("file", b"")
    files.remove("file")
    files.remove_made()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert not list((tmp_path / "mine").iterdir())


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/passwd", ""])
def test_names_that_lead_out_are_known(name: str) -> None:
    assert not is_inside(name)
    assert is_inside("state/id.json")
