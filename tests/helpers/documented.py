"""Where documented code runs: a home folder with the demo's files, and searches that are tiny."""

from __future__ import annotations

import shutil
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

import autopeft
from autopeft import api
from autopeft.saved_inputs import saved_inputs

SMALL: dict[str, Any] = {
    "budget": "6trials",
    "steps": 4,
    "batch_size": 8,
    "max_length": 16,
    "backend": "local",
    "confirm_seeds": 1,
    "max_finalists": 2,
}


def make_home(folder: Path, model: Path, data: Path) -> Path:
    """Return a home folder where the demo's model and data are tiny ones."""
    cache = folder / ".cache" / "autopeft"
    cache.mkdir(parents=True)
    shutil.copytree(model, cache / "all-MiniLM-L6-v2")
    shutil.copy(data, cache / "movie_snippets.csv")
    return folder


def shorten_searches(monkeypatch: pytest.MonkeyPatch, searched: Path) -> None:
    """Make `autopeft.search` check its settings, then hand back a finished search."""

    @wraps(api.search)
    def search(settings: Any = None, *, callbacks: Any = (), **overrides: Any) -> Any:
        if "output" not in overrides:
            return api.search(settings, **overrides)
        with saved_inputs(overrides, None) as plain:
            merged = api.merge_settings(settings, plain)
        if not Path(merged.output).exists():
            shutil.copytree(searched, merged.output)
        return autopeft.SearchResult.read(merged.output)

    @wraps(api.resume)
    def resume(folder: str, *, callbacks: Any = (), **overrides: Any) -> Any:
        api.merge_settings(None, overrides)
        return autopeft.SearchResult.read(folder)

    monkeypatch.setattr(autopeft, "search", search, raising=False)
    monkeypatch.setattr(autopeft, "resume", resume, raising=False)
