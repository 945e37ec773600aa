from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from searches import loads, logits_of, searched
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from autopeft.errors import DataError
from autopeft.settings import SearchSettings
from autopeft.tasks.batch import collate
from autopeft.tasks.load_data import load_data
from autopeft.tasks.reading import Table
from autopeft.tasks.registry import make_task
from autopeft.training.evaluation import evaluate
from autopeft.training.setup import TrainingSetup

LABELS = ("anger", "fear", "joy")
WORD = {"anger": "bad", "fear": "not", "joy": "good"}
NAME = "multi-label-classification"


def rows_of(n: int = 60) -> list[tuple[str, list[str]]]:
    chooser = random.Random(0)
    rows = []
    for i in range(n):
        labels = [label for label in LABELS if chooser.random() < 0.4]
        words = [WORD[label] for label in labels] + [f"w{i}"]
        rows.append((" ".join(words), labels))
    return rows


def table_of(**columns: Any) -> Table:
    texts = [text for text, _ in rows_of()]
    return Table("memory", {"text": texts, **columns})


def lists() -> Table:
    return table_of(labels=[labels for _, labels in rows_of()])


def task_for(table: Table, **settings: Any) -> Any:
    return make_task(SearchSettings(**settings), table)


def loaded(table: Table, tokenizer: Any, **settings: Any) -> Any:
    task = task_for(table, **settings)
    return load_data(task.settings, task, tokenizer, {"train": table})


def test_every_layout_gives_the_same_targets(encoder_tokenizer: Any) -> None:
    rows = rows_of()
    bits = {name: [int(name in own) for _, own in rows] for name in LABELS}
    named = {"task": NAME}
    found = [
        loaded(lists(), encoder_tokenizer),
        loaded(table_of(label=[str(own) for _, own in rows]), encoder_tokenizer),
        loaded(
            table_of(labels=[";".join(own) for _, own in rows]),
            encoder_tokenizer,
            **named,
            task_options={"separator": ";"},
        ),
        loaded(table_of(**bits), encoder_tokenizer, **named),
        loaded(
            table_of(number=[0] * 60, **bits),
            encoder_tokenizer,
            **named,
            task_options={"label_columns": "anger;fear;joy"},
        ),
    ]
    assert len({data.fingerprint for data in found}) == 1
    data = found[0]
    assert data.labels == LABELS
    assert data.n_dropped == 0
    for split in data.splits.values():
        targets = split.row_arrays["labels"]
        assert targets.dtype == np.float32
        for row, own in zip(split.source_rows, targets, strict=True):
            assert [LABELS[i] for i in np.flatnonzero(own)] == rows[row][1]
    assert any("rows of memory have no label" in note for note in data.notes)


def test_ids_are_names_and_missing_labels_are_dropped(encoder_tokenizer: Any) -> None:
    values: list[Any] = [[i % 3, 10] for i in range(60)]
    values[3], values[4] = None, []
    data = loaded(table_of(labels=values), encoder_tokenizer)
    assert data.labels == ("0", "1", "2", "10")
    assert data.dropped == {"the label is missing": 1}


@pytest.mark.parametrize("kind", [int, float, bool])
def test_lists_of_0_and_1_have_a_place_for_each_class(kind: Any, encoder_tokenizer: Any) -> None:
    bits = [[kind(name in own) for name in LABELS] for _, own in rows_of()]
    data = loaded(table_of(labels=bits), encoder_tokenizer)
    assert data.labels == ("0", "1", "2")
    for split in data.splits.values():
        expected = [bits[row] for row in split.source_rows]
        assert split.row_arrays["labels"].tolist() == expected
    assert "labels are lists of 0 and 1, one for each of 3 classes" in data.notes


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ("anger;fear", "row 8 of memory holds 'anger;fear' where a list of labels"),
        ({"anger": 1}, "row 8 of memory holds"),
        ([["anger"]], "row 8 of memory holds"),
        ([None], "row 8 of memory holds"),
    ],
)
def test_cells_of_another_kind_are_refused(cell: Any, problem: str, encoder_tokenizer: Any) -> None:
    values: list[Any] = [own for _, own in rows_of()]
    values[7] = cell
    with pytest.raises(DataError, match=problem):
        loaded(table_of(labels=values), encoder_tokenizer, task=NAME)


@pytest.mark.parametrize("values", [[["anger", "fear"]] * 60, ["['anger', 'fear']"] * 60])
def test_lists_are_no_single_label(values: list[Any], encoder_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="use --task multi-label-classification"):
        loaded(table_of(label=values), encoder_tokenizer, task="text-classification")


def test_a_label_without_training_rows_is_refused(encoder_tokenizer: Any) -> None:
    other = Table("other", {"text": ["good w1"] * 4, "labels": [["new"]] * 4})
    task = task_for(lists())
    with pytest.raises(DataError, match="occurs in validation but in no training row"):
        load_data(task.settings, task, encoder_tokenizer, {"train": lists(), "validation": other})


def test_columns_of_other_numbers_are_refused(encoder_tokenizer: Any) -> None:
    bits = [i % 2 for i in range(60)]
    options = {"task": NAME, "task_options": {"label_columns": "a;b"}}
    with pytest.raises(DataError, match="row 6 of memory holds -1 where 0 or 1 is expected"):
        loaded(table_of(a=bits, b=[*bits[:5], -1, *bits[6:]]), encoder_tokenizer, **options)
    with pytest.raises(DataError, match="no such column"):
        loaded(table_of(a=bits), encoder_tokenizer, **options)


def test_loss_is_that_of_transformers(encoder_tokenizer: Any) -> None:
    data = loaded(lists(), encoder_tokenizer)
    task = task_for(lists()).bound(data)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(encoder_tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
        problem_type=task.model_kwargs()["problem_type"],
    )
    model = BertForSequenceClassification(config).eval()
    rows = np.arange(6)
    batch = collate(data, "train", rows)
    texts = [rows_of()[row][0] for row in data.train.source_rows[rows]]
    expected = encoder_tokenizer(texts, padding=True, return_tensors="pt")
    assert torch.equal(batch.input_ids, expected["input_ids"])
    with torch.no_grad():
        whole = model(**expected, labels=batch.labels).loss
        assert float(task.loss(model, batch)) == pytest.approx(float(whole), rel=1e-6)
        parts = task.losses(model, batch, 2)
        alone = [task.loss(model, collate(data, "train", part)) for part in (rows[:3], rows[3:])]
        torch.testing.assert_close(parts, torch.stack(alone))
    found = evaluate(model, TrainingSetup(task, data), "test")
    assert set(found.metrics) == {"f1_micro", "f1_macro", "accuracy", "loss"}
    assert len(found.rows) == len(data.test)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
def test_a_saved_adapter_scores_what_front_json_says(tiny_model: Path, tmp_path: Path) -> None:
    rows = rows_of(100)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "labels": own}) for t, own in rows))
    found = searched(tiny_model, path, tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = [rows[row][0] for row in found.test_rows]
    for name, model in loads(
        found, "AutoModelForSequenceClassification", tmp_path / "merged"
    ).items():
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        logits = logits_of(model, **batch)
        assert logits.shape == (len(texts), 3), name
        predicted = [
            {model.config.id2label[i] for i in np.flatnonzero(own)} for own in logits.numpy() > 0
        ]
        right = [p == set(rows[r][1]) for p, r in zip(predicted, found.test_rows, strict=True)]
        assert found.score["accuracy"] == pytest.approx(np.mean(right), abs=1e-9), name
        targets = np.asarray([[x in rows[r][1] for x in LABELS] for r in found.test_rows])
        assert found.score["f1_micro"] == pytest.approx(
            sk.f1_score(targets, logits.numpy() > 0, average="micro", zero_division=0.0), abs=1e-9
        )
