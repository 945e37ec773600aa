"""A study that came from others is read and shown, and nothing is written or made."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.artifacts.exceptions import ArtifactNotFound

from autopeft.errors import StorageError
from autopeft.searcher.artifacts import StoredArtifacts
from autopeft.searcher.storage import open_storage, open_to_read
from autopeft.searcher.study import read_study


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "place", ["{}/a {{b}} study%20?.db", "sqlite:///{}/study.db", "{}/study.log"]
)
def test_a_storage_is_read_and_not_written_to(tmp_path: Path, place: str) -> None:
    place = place.format(tmp_path)
    study = optuna.create_study(study_name="s", storage=open_storage(place))
    study.add_trial(optuna.trial.create_trial(value=0.5))
    before = _contents(tmp_path)
    opened = open_to_read(place)
    found = optuna.load_study(study_name="s", storage=opened)
    assert [trial.value for trial in found.trials] == [0.5]
    writes: tuple[Any, ...] = (
        lambda: found.set_user_attr("a", 1),
        lambda: found.ask(),
        lambda: optuna.create_study(study_name="t", storage=opened),
        lambda: optuna.delete_study(study_name="s", storage=opened),
    )
    for write in writes:
        with pytest.raises(StorageError, match="opened to be read alone"):
            write()
    assert _contents(tmp_path) == before


@pytest.mark.parametrize("place", ["{}/no.db", "sqlite:///{}/no.db", "{}/no.log", "sqlite://"])
def test_a_storage_that_is_not_there_is_not_made(tmp_path: Path, place: str) -> None:
    with pytest.raises(StorageError, match="no such file"):
        read_study(place.format(tmp_path), "s")
    assert not list(tmp_path.iterdir())


def test_an_empty_file_does_not_become_a_database(tmp_path: Path) -> None:
    (tmp_path / "study.db").touch()
    with pytest.raises(StorageError, match="cannot be opened"):
        read_study(tmp_path / "study.db", "s")
    assert (tmp_path / "study.db").stat().st_size == 0


def test_the_dashboard_shows_such_a_study(tmp_path: Path) -> None:
    from optuna_dashboard import wsgi

    place = tmp_path / "study.db"
    optuna.create_study(study_name="shown", storage=open_storage(place))
    served = wsgi(open_to_read(place), StoredArtifacts(tmp_path / "artifacts"))

    def ask(method: str, path: str, body: bytes = b"") -> tuple[str, bytes]:
        told: list[str] = []
        request: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "80",
            "CONTENT_TYPE": "application/json",
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": io.StringIO(),
            "wsgi.url_scheme": "http",
        }
        answer = b"".join(served(request, lambda status, *_: told.append(status)))
        return told[0], answer

    status, answer = ask("GET", "/api/studies")
    assert status.startswith("200")
    assert json.loads(answer)["study_summaries"][0]["study_name"] == "shown"
    before = _contents(tmp_path)
    note = json.dumps({"body": "mine", "version": 1}).encode()
    assert not ask("PUT", "/api/studies/1/note", note)[0].startswith("2")
    assert not ask("DELETE", "/api/studies/1")[0].startswith("2")
    assert _contents(tmp_path) == before


def test_artifacts_are_read_in_their_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "artifacts"
    store = StoredArtifacts(folder)
    with pytest.raises(ArtifactNotFound):
        store.open_reader("a")
    assert not folder.exists()
    folder.mkdir()
    (folder / "a").write_bytes(b"content")
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    with store.open_reader("a") as file:
        assert file.read() == b"content"
    for name in ("../secret", "link"):
        with pytest.raises(ArtifactNotFound):
            store.open_reader(name)
    for change in (lambda: store.write("b", io.BytesIO(b"")), lambda: store.remove("a")):
        with pytest.raises(StorageError, match="only shown"):
            change()


@pytest.mark.parametrize("value", [3, None, {"a": 1}, "lora:8@attn.q[0-9999999]"])
def test_a_trial_of_another_form_is_named(tmp_path: Path, value: object) -> None:
    study = optuna.create_study(study_name="s", storage=open_storage(tmp_path / "study.db"))
    study.add_trial(optuna.trial.create_trial(value=0.5, user_attrs={"plan": value}))
    with pytest.raises(StorageError, match=r"study .s., trial 0 is damaged .no trial of autopeft"):
        read_study(tmp_path / "study.db", "s")
