"""Tests of the files of a search as artifacts of its study."""

from __future__ import annotations

import zipfile
from pathlib import Path

import optuna
import pytest
from optuna.artifacts import get_all_artifact_meta

from autopeft.searcher.artifacts import artifact_store, save_artifacts


def test_files_and_adapters_are_artifacts_that_a_second_time_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autopeft.searcher.artifacts.MAX_ADAPTER_BYTES", 100)
    study = optuna.create_study()
    page, small, large = tmp_path / "report.html", tmp_path / "small", tmp_path / "large"
    (small / "more").mkdir(parents=True)
    (small / "more" / "plan.json").write_text("{}")
    large.mkdir()
    (large / "adapter.safetensors").write_bytes(bytes(101))
    place = tmp_path / "artifacts"
    for text in ("first", "second"):
        page.write_text(text)
        left_out = save_artifacts(study, place, [page], {"a": small, "b": large})
        assert left_out == ("b",)
    found = {meta.filename: meta.artifact_id for meta in get_all_artifact_meta(study)}
    assert sorted(found) == ["a.zip", "report.html"]
    assert len(list(place.iterdir())) == 2
    with artifact_store(place).open_reader(found["report.html"]) as content:
        assert content.read() == b"second"
    with zipfile.ZipFile(place / found["a.zip"]) as archive:
        assert archive.namelist() == ["more/plan.json"]
