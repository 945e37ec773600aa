"""A full disk in a search: one line, nothing half-written, and a resume that works."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import autopeft
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
