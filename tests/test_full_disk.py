"""A full disk in a search: one line, nothing half-written, and a resume that works."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import autopeft
from autopeft.confirm.store import ConfirmationStore
from autopeft.errors import StorageError
from autopeft.utils import files
from autopeft.utils.folder_lock import is_of_lock

SHORT: dict[str, Any] = {
    "metric": "accuracy",
    "budget": "5trials",
    "steps": 9,
    "rungs": 2,
    "confirm_seeds": 1,
    "max_finalists": 1,
    "workers": 1,
}


def evaluate(candidate: Any, *, seed: int, report: Any) -> dict[str, float]:
    report(report.rungs[0], 0.5)
    if report.is_confirming:
        (report.folder / "adapter.bin").write_bytes(b"adapter")
    return {"accuracy": 0.5 + 0.01 * len(candidate.plan.specs)}


@pytest.fixture
def fill(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the disk full for every file with a part in its path, from now on."""
    write = files._write_bytes
    parts: list[str] = []

    def write_or_not(path: Path, content: bytes) -> None:
        if any(part in str(path) for part in parts):
            path.parent.mkdir(parents=True, exist_ok=True)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(files, "_write_bytes", write_or_not)

    def full(part: str) -> None:
        parts[:] = [part] if part else []

    return full


@pytest.mark.timeout(200)
@pytest.mark.filterwarnings("default")  # Ray's own sockets and deprecations.
@pytest.mark.parametrize(
    ("part", "backend"),
    [
        ("score.json", "local"),
        ("front.json", "local"),
        ("report.html", "local"),
        pytest.param("score.json", "ray", marks=pytest.mark.nightly),
    ],
)
def test_it_is_one_line_and_the_search_goes_on_later(
    part: str, backend: str, tiny_model: Path, tmp_path: Path, fill: Callable[[str], None]
) -> None:
    folder = tmp_path / "run"
    fill(part)
    with pytest.raises(StorageError) as caught:
        autopeft.search(
            model=str(tiny_model), evaluate=evaluate, output=folder, **SHORT, backend=backend
        )
    line = str(caught.value)
    assert "No space left on device" in line
    assert "make room there" in line
    assert "\n" not in line
    assert not [path for path in folder.rglob(".*") if not is_of_lock(path)]
    fill("")
    result = autopeft.resume(folder, backend="local")
    assert result.view.is_complete
    assert result.view.trials["complete"] == 5
    assert result.view.trials["failed"] == 0
    assert (folder / "report.html").exists()


def test_what_is_small_is_written_if_the_adapters_are_not(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a search that had ended left neither front.json nor trials.csv (issue 18)."""
    folder, publish = tmp_path / "run", ConfirmationStore.publish

    def full(*_: Any) -> None:
        raise files.not_written("folder", folder / "adapters", OSError(errno.ENOSPC, "No space"))

    monkeypatch.setattr(ConfirmationStore, "publish", full)
    with pytest.raises(StorageError, match=r"No space.*make room there"):
        autopeft.search(
            model=str(tiny_model),
            evaluate=evaluate,
            output=folder,
            progress=False,
            **SHORT | {"backend": "local", "budget": "3trials"},
        )
    assert (folder / "trials.csv").is_file()
    assert not autopeft.SearchResult.read(folder).view.is_complete
    monkeypatch.setattr(ConfirmationStore, "publish", publish)
    again = autopeft.resume(folder, evaluate=evaluate, progress=False)
    assert again.view.is_complete
    assert again.best is not None
    assert again.best.folder is not None
