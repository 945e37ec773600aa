"""A search goes on with the data and the model that it was begun with, or not at all."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from searches import SHORT

import autopeft
from autopeft.errors import DataError, ModelError, UserError
from autopeft.inputs import Inputs, beside_digest, model_digests, rows_digest

pytestmark = [pytest.mark.timeout(200)]


def test_what_is_not_known_is_not_compared() -> None:
    full = Inputs("a", "b", "c", "d")
    for other in (full, Inputs(), Inputs("a"), Inputs(model="c")):
        full.check_same(other, model="m", data="d.csv")
        other.check_same(full, model="m", data="d.csv")


@pytest.mark.parametrize(
    ("now", "error", "says"),
    [
        (Inputs("x", "b", "c", "d"), DataError, "data='d.csv'.*other contents; restore the data"),
        (Inputs("x", "x", "c", "d"), DataError, "rows of the test would have been trained on"),
        (Inputs("x", "b", "c", "x"), ModelError, "model='m': tokenizer or chat template"),
        (Inputs("x", "x", "x", "x"), ModelError, "weights are not those"),
        (Inputs("a", "b", "c", "d", beside="x"), ModelError, "pooling or code are not those"),
    ],
)
def test_the_cause_is_named_with_its_remedy(now: Inputs, error: type[UserError], says: str) -> None:
    with pytest.raises(error, match=says) as refused:
        Inputs("a", "b", "c", "d", beside="e").check_same(now, model="m", data="d.csv")
    assert "--warm-start" in str(refused.value)
    # Of a search that joins others nothing has changed, and it has no folder to go on from.
    with pytest.raises(error, match=r"the study was begun with .*--study-name") as refused:
        Inputs("a", "b", "c", "d", beside="e").check_same(now, model="m", data="d.csv", joins=True)
    assert "--warm-start" not in str(refused.value)


def test_a_change_anywhere_in_large_weights_is_seen(tmp_path: Path) -> None:
    weights = bytearray(5_000_000)
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights)
    before = model_digests(str(tmp_path))
    assert before == model_digests(str(tmp_path))
    weights[-1:] = b"x"
    path.write_bytes(weights)
    assert model_digests(str(tmp_path)) != before
    assert model_digests("org/name") == ("", "")


@pytest.mark.parametrize(
    "name", ["generation_config.json", "1_Pooling/config.json", "modeling_own.py", "spiece.model"]
)
def test_what_decides_beside_the_weights_is_seen(tmp_path: Path, name: str) -> None:
    (tmp_path / "1_Pooling").mkdir()
    found = [beside_digest(str(tmp_path))]
    for text in ("{}", '{"pooling_mode_cls_token": true}'):
        (tmp_path / name).write_text(text)
        found.append(beside_digest(str(tmp_path)))
    assert len(set(found)) == 3
    assert beside_digest("org/name") == ""


def test_changed_code_of_a_metric_is_told_and_stays_in_the_report(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: scores of two metrics stood on one front, and nothing said so."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    code = "def share(targets, predictions):\n    return (targets == predictions) * {}\n"
    module, folder = tmp_path / "changed_metric.py", tmp_path / "run"

    def resumed(text: str, budget: str) -> list[str]:
        module.write_text(text)
        monkeypatch.delitem(sys.modules, "changed_metric", raising=False)
        told = autopeft.resume(folder, budget=budget, progress=False).view.warnings
        return [line for line in told if line.startswith("metric: its module is not as when")]

    module.write_text(code.format(1.0))
    settings = {"model": str(tiny_model), "data": str(tiny_data), "budget": "2trials"}
    autopeft.search(SHORT, metric="changed_metric:share", **settings, output=folder, progress=False)
    assert not resumed("# The same.\n" + code.format(1.0), "3trials")
    assert len(resumed(code.format(0.5), "4trials")) == 1
    assert len(resumed(code.format(0.5), "5trials")) == 1


def test_the_order_of_splits_does_not_matter() -> None:
    one = rows_digest({"train": {"rows": [1, 2]}, "test": {"rows": [0]}})
    assert one == rows_digest({"test": {"rows": [0]}, "train": {"rows": [1, 2], "source": "x"}})
    assert one != rows_digest({"train": {"rows": [1, 0]}, "test": {"rows": [2]}})
    assert rows_digest({}) == ""


def test_a_changed_file_is_refused_before_any_training(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Regression: the search went on, with rows that had moved from train to test."""
    model, data, folder = tmp_path / "model", tmp_path / "data.csv", tmp_path / "run"
    shutil.copytree(tiny_model, model)
    shutil.copy(tiny_data, data)
    autopeft.search(SHORT, model=str(model), data=str(data), output=folder, progress=False)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".json"}
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join([lines[0], *reversed(lines[1:])]))
    for is_former in (False, True):
        with pytest.raises(DataError, match="changed since the search was begun"):
            autopeft.resume(folder, budget="5trials", progress=False)
        if not is_former:
            data.write_text("".join([*lines[:-5]]))
            (folder / "state" / "inputs.json").rename(tmp_path / "inputs.json")
    (tmp_path / "inputs.json").rename(folder / "state" / "inputs.json")
    data.write_text("".join(lines))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 0.1}))
    with pytest.raises(ModelError, match="weights are not those"):
        autopeft.resume(folder, budget="5trials", progress=False)
    assert before == {path: path.read_bytes() for path in before}
    (model / "config.json").write_text((tiny_model / "config.json").read_text())
    again = autopeft.resume(folder, budget="5trials", progress=False)
    assert sum(again.view.trials.values()) == 5
