"""A fine-tuned classifier: its head is kept where its labels are the data's, else replaced."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from searches import loads, logits_of, searched

import autopeft
from autopeft.preparing.prepare import prepare
from autopeft.settings import SearchSettings
from autopeft.tasks.labels import in_order
from autopeft.tasks.registry import find_task
from autopeft.utils.quiet import quiet_transformers

WORDS = {"good": ("lovely", "warm"), "bad": ("awful", "cold"), "mixed": ("so", "plot")}
ORDER = ("mixed", "good", "bad")
"""Not the alphabetical order, which a new head would have."""
CLASS = "AutoModelForSequenceClassification"

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]


def _texts(n: int, names: tuple[str, ...] = ORDER) -> tuple[list[str], list[str]]:
    classes = [ORDER[i % 3] for i in range(n)]
    texts = [f"{WORDS[c][i // 3 % 2]} was the film {i}" for i, c in enumerate(classes)]
    return texts, [names[ORDER.index(c)] for c in classes]


def _write(path: Path, names: tuple[str, ...] = ORDER) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *zip(*_texts(120, names), strict=True)])
    return path


@pytest.fixture(scope="module")
def fine_tuned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that is right about every text."""
    folder = tmp_path_factory.mktemp("fine-tuned")
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_model)
    texts, names = _texts(60)
    targets = torch.tensor([ORDER.index(name) for name in names])
    rows = tokenizer(texts, padding=True, return_tensors="pt")
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.AutoModelForSequenceClassification.from_pretrained(
            tiny_model,
            id2label=dict(enumerate(name.upper() for name in ORDER)),
            label2id={name.upper(): i for i, name in enumerate(ORDER)},
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(100):
            optimizer.zero_grad()
            model(**rows, labels=targets).loss.backward()
            optimizer.step()
        model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert (logits_of(model, **rows).argmax(dim=-1) == targets).all()
    return folder


def _prepared(model: Path, data: Path) -> Any:
    return prepare(
        SearchSettings.from_mapping(
            {"model": str(model), "data": str(data), "budget": "3trials", "steps": 9, "workers": 1}
        )
    )


def test_a_head_that_knows_the_labels_is_kept_with_its_order(
    fine_tuned: Path, tmp_path: Path
) -> None:
    found = searched(fine_tuned, _write(tmp_path / "rows.csv"), tmp_path / "run")
    front = json.loads((tmp_path / "run" / "front.json").read_text())
    assert front["reference"]["validation"]["accuracy"] == 1.0
    assert front["reference"]["price"]["trainable_params"] == 0
    assert found.score["accuracy"] == 1.0
    assert front["data"]["labels"] == list(ORDER)
    tokenizer = hf.AutoTokenizer.from_pretrained(fine_tuned)
    texts, names = _texts(120)
    rows = tokenizer(texts, padding=True, return_tensors="pt")
    before = hf.AutoModelForSequenceClassification.from_pretrained(fine_tuned)
    for name, model in loads(found, CLASS, tmp_path / "merged").items():
        predicted = logits_of(model, **rows).argmax(dim=-1).tolist()
        assert [model.config.id2label[index] for index in predicted] == names, name
        if name != "peft":
            assert torch.equal(model.classifier.weight, before.classifier.weight), name


PLAIN = {0: "LABEL_0", 1: "LABEL_1"}


@pytest.mark.parametrize(
    ("labels", "config", "expected"),
    [
        ({"neg", "pos"}, {"id2label": {0: "POS", 1: "NEG"}}, ("pos", "neg")),
        # Letter case is all that tells some labels apart.
        ({"a", "A"}, {"id2label": {0: "a", 1: "A"}}, ("a", "A")),
        ({"a", "A", "b"}, {"id2label": {0: "b", 1: "a"}}, None),
        # Some checkpoints name their outputs in one direction only.
        ({"neg", "pos"}, {"id2label": PLAIN, "label2id": {"pos": 0, "neg": 1}}, ("pos", "neg")),
        ({"neg", "pos"}, {"id2label": PLAIN, "label2id": {"pos": 0, "neg": 2}}, None),
        ({"neg", "pos"}, {"id2label": {0: "pos", 2: "neg"}}, None),
        ({"0", "1"}, {"id2label": {0: 0, 1: 1}}, ("0", "1")),
        ({"1", "0"}, {"id2label": PLAIN}, ("0", "1")),
        ({"1", "2"}, {"id2label": PLAIN}, None),
    ],
)
def test_labels_are_in_the_order_of_a_head_that_knows_them(
    labels: set[str], config: dict[str, Any], expected: tuple[str, ...] | None
) -> None:
    assert in_order(labels, SimpleNamespace(**config)) == (
        expected or tuple(sorted(labels)),
        expected is not None,
    )


def test_a_head_of_other_labels_is_replaced_and_said(fine_tuned: Path, tmp_path: Path) -> None:
    data = _write(tmp_path / "rows.csv", ("neutral", "yes", "no"))
    ready = _prepared(fine_tuned, data)
    assert ready.data.labels == ("neutral", "no", "yes")
    assert any("a new head is trained" in note for note in ready.data.notes)
    assert ready.prices.topology.head_params == 3 * 16 + 3
    found = searched(fine_tuned, data, tmp_path / "run")
    front = json.loads((tmp_path / "run" / "front.json").read_text())
    assert front["reference"]["price"]["trainable_params"] == 3 * 16 + 3
    tokenizer = hf.AutoTokenizer.from_pretrained(fine_tuned)
    texts, names = _texts(120, ("neutral", "yes", "no"))
    rows = tokenizer(texts, padding=True, return_tensors="pt")
    right = [names[row] for row in found.test_rows]
    for name, model in loads(found, CLASS, tmp_path / "merged").items():
        predicted = logits_of(model, **rows).argmax(dim=-1)[found.test_rows].tolist()
        hits = [model.config.id2label[p] == r for p, r in zip(predicted, right, strict=True)]
        assert sum(hits) / len(hits) == pytest.approx(found.score["accuracy"]), name
        assert model.config.id2label == {0: "neutral", 1: "no", 2: "yes"}


def test_a_head_of_another_kind_is_replaced(
    fine_tuned: Path, tmp_path: Path, tiny_model: Path
) -> None:
    # A token classifier's layer has the same name and shape.
    folder = tmp_path / "tags"
    shutil.copytree(fine_tuned, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["BertForTokenClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    data = _write(tmp_path / "rows.csv")
    assert _prepared(folder, data).prices.topology.head_params == 3 * 16 + 3
    assert _prepared(tiny_model, data).prices.topology.head_params == 3 * 16 + 3
    kept = _prepared(fine_tuned, data)
    assert kept.prices.topology.head_params == 0
    assert autopeft.price(model=str(fine_tuned), data=str(data)).rows[0].price.trainable_params == 0


@pytest.mark.parametrize(
    ("task", "architecture", "expected"),
    [
        ("text-classification", "BertForSequenceClassification", True),
        ("text-classification", "BertForTokenClassification", False),
        ("token-classification", "BertForTokenClassification", True),
        ("image-classification", "ViTForImageClassification", True),
        ("image-classification", "DeiTForImageClassificationWithTeacher", True),
        ("regression", "LlamaForSequenceClassification", True),
        ("regression", "LlamaForCausalLM", False),
    ],
)
def test_a_head_is_of_its_tasks_kind(task: str, architecture: str, expected: bool) -> None:
    config = SimpleNamespace(architectures=[architecture], id2label={0: "a"}, num_labels=1)
    found = find_task(task).configured(SearchSettings(), config)
    assert found.has_head(config) == expected
    assert found.replaces_head(("a",)) != expected
    assert found.replaces_head(("b",)) or task == "regression"
