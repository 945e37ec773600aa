"""An export is scored on the test split; the search's folder and the card tell it, marked lossy."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from click.testing import CliRunner
from searches import SHORT

import autopeft
from autopeft import cli
from autopeft.comparing.converted import ExportScorer
from autopeft.errors import DataError, SettingsError, StorageError
from autopeft.models.quantization import keep_weights
from autopeft.preparing.task_data import load_task
from autopeft.reporting.converted import weights_of
from autopeft.tasks.batch import collate
from autopeft.utils.quiet import quiet_transformers
from autopeft.workspace import Workspace

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="not installed"),
]


@pytest.fixture(scope="module")
def run(
    tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> autopeft.SearchResult:
    output = tmp_path_factory.mktemp("converted") / "run"
    asked: dict[str, Any] = {
        **SHORT,
        "model": str(tiny_model),
        "data": str(tiny_data),
        "output": str(output),
        "quantization": "bnb-4bit",
        "max_train_rows": 32,
        "max_validation_rows": 16,
        "max_test_rows": 40,
        "budget": "2trials",
        "steps": 4,
        "compress": False,
        "space": {"methods": {"lora": {"ranks": [2]}}},
    }
    return autopeft.search(asked, progress=False)


def _accuracy(folder: Path, run: Path) -> float:
    """What transformers alone makes of the test rows."""
    data, _ = load_task(Workspace(run).settings())
    with quiet_transformers():
        model = hf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    keep_weights(model)  # bitsandbytes would repack these, whose shape it cannot.
    hits = []
    for row in range(len(data.test)):
        batch = collate(data, "test", np.array([row]))
        with torch.inference_mode():
            hits.append(model(**batch.model_inputs()).logits.argmax() == batch.labels[0])
    return sum(map(float, hits)) / len(hits)


def test_a_requantized_member_is_scored_and_shown(run: autopeft.SearchResult) -> None:
    target = run.folder.parent / "merged"
    words = ["export", str(run.folder), "--format", "merged", "--requantize", "--score"]
    done = CliRunner().invoke(cli.app, [*words, "--to", str(target)])
    assert done.exit_code == 0, done.output
    (found,) = autopeft.SearchResult.read(run.folder).converted
    assert run.best is not None
    assert (found.digest, found.format, found.lossy) == (run.best.digest, "merged", True)
    assert found.quantization == "bnb-4bit"
    assert found.n_rows == 40
    assert found.metrics["accuracy"] == pytest.approx(_accuracy(target, run.folder))
    own = run.best.entry.adapter_score
    assert own is not None
    assert found.member == own.metrics
    assert run.best.folder is not None
    assert found.weights == weights_of(run.best.folder)
    text = f"accuracy {found.metrics['accuracy']:.4f} on 40 test rows"
    for told in (done.output, *[(target / "README.md").read_text()]):
        assert text in told
        assert "lossy" in told
    page = (run.folder / "report.html").read_text()
    assert text in page
    assert f"converted-0-{run.best.digest}" in page
    assert json.loads((run.folder / "front.json").read_text())["converted"][0]["lossy"] is True
    before = (run.folder / "converted.json").read_text()
    again = autopeft.report(run.folder)
    assert again.converted == (found,)
    assert (run.folder / "converted.json").read_text() == before


def test_an_export_of_the_same_form_replaces_the_earlier_score(run: autopeft.SearchResult) -> None:
    for name, format in (("one", "lora"), ("two", "lora")):
        autopeft.export(run.folder, format=format, score=True, to=run.folder.parent / name)
    found = autopeft.SearchResult.read(run.folder).converted
    (lora,) = [each for each in found if each.format == "lora"]
    # What serves it loads whole weights, and it was trained over those in 4 bits.
    assert lora.lossy
    assert lora.metrics["accuracy"] == pytest.approx(lora.member["accuracy"], abs=0.03)


def test_nothing_else_changes_the_run_while_an_export_is_scored(
    run: autopeft.SearchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: of two exports, or an export beside a resume, one lost what the other wrote."""
    score, refused = ExportScorer.score, []

    def beside(self: ExportScorer, model: Any) -> None:
        for other in (
            lambda: autopeft.resume(run.folder, progress=False),
            lambda: autopeft.export(
                run.folder, format="lora", score=True, to=run.folder.parent / "other"
            ),
        ):
            with pytest.raises(StorageError, match="is in use by process") as caught:
                other()
            refused.append(str(caught.value))
        score(self, model)

    monkeypatch.setattr(ExportScorer, "score", beside)
    target = run.folder.parent / "alone"
    assert autopeft.export(run.folder, format="lora", score=True, to=target).converted
    assert len(refused) == 2
    assert not any("\n" in line for line in refused)
    assert not (run.folder.parent / "other").exists()
    with Workspace(run.folder).held(is_new=False):
        # What only reads needs no lock.
        autopeft.export(run.folder, format="lora", to=run.folder.parent / "other")


def test_an_export_that_ends_before_its_card_is_written_leaves_no_folder(
    run: autopeft.SearchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a kill left a folder without a card, and the next export found it taken."""

    def interrupted(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    target = run.folder.parent / "no-card"
    with monkeypatch.context() as patch:
        patch.setattr("autopeft.reporting.model_card.model_card", interrupted)
        for format in ("peft", "merged"):
            with pytest.raises(KeyboardInterrupt):
                autopeft.export(run.folder, format=format, to=target)
            assert not target.exists()
    autopeft.export(run.folder, format="merged", to=target)
    assert (target / "README.md").is_file()


def test_what_cannot_be_scored_is_refused_before_it_is_written(run: autopeft.SearchResult) -> None:
    target = run.folder.parent / "refused"
    with pytest.raises(SettingsError, match="peft is a copy of the member"):
        autopeft.export(run.folder, score=True, to=target)
    settings = (run.folder / "settings.yaml").read_text()
    (run.folder / "settings.yaml").write_text(
        settings.replace("max_test_rows: 40", "max_test_rows: 39")
    )
    with pytest.raises(DataError, match="is not what the search read"):
        autopeft.export(run.folder, format="merged", score=True, to=target)
    (run.folder / "settings.yaml").write_text(settings)
    kept = run.folder / "converted.json"
    before = kept.read_text() if kept.exists() else "[]"
    kept.write_text("[{")
    with pytest.raises(StorageError, match="remove the file; autopeft export --score"):
        autopeft.export(run.folder, format="lora", score=True, to=target)
    kept.write_text(before)
    assert not target.exists()


def test_a_comparison_tells_over_which_weights_a_member_was_trained(
    run: autopeft.SearchResult, tiny_model: Path, tiny_data: Path
) -> None:
    said = "; trained over bnb-4bit weights, scored over whole ones"
    asked: dict[str, Any] = {"model": str(tiny_model), "data": str(tiny_data)}
    found = autopeft.compare([run.folder], output=run.folder.parent / "whole", **asked)
    assert [said in entry.method for entry in found.entries if entry.kind == "autopeft"] == [True]
