from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf
from searches import loads, logits_of, searched

from autopeft.errors import DataError
from autopeft.models.output_scale import has_output_bias, in_unit
from autopeft.settings import SearchSettings
from autopeft.tasks.batch import collate
from autopeft.tasks.data import OutputScale
from autopeft.tasks.load_data import load_data
from autopeft.tasks.reading import Table
from autopeft.tasks.registry import make_task
from autopeft.training.evaluation import evaluate
from autopeft.training.setup import TrainingSetup

CLASS = "AutoModelForSequenceClassification"
SMALL = {
    "vocab_size": 240,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
CONFIGS: dict[str, Any] = {
    "bert": lambda: hf.BertConfig(**SMALL),
    "roberta": lambda: hf.RobertaConfig(**SMALL),
    "distilbert": lambda: hf.DistilBertConfig(dim=16, n_heads=2, n_layers=1, hidden_dim=16),
    "llama": lambda: hf.LlamaConfig(**SMALL, pad_token_id=0),
    "gpt2": lambda: hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, pad_token_id=0),
}


def numbers(n: int = 60, mean: float = 1000.0) -> tuple[list[str], list[float]]:
    chooser = random.Random(0)
    texts, values = [], []
    for i in range(n):
        is_good = chooser.random() < 0.5
        texts.append(f"the film was {'good' if is_good else 'bad'} w{i}")
        values.append(mean + (40.5 if is_good else -40.5) + chooser.random())
    return texts, values


def table_of(**columns: Any) -> Table:
    texts, values = numbers()
    return Table("memory", {"text": texts, **(columns or {"label": values})})


def loaded(table: Table, tokenizer: Any, config: Any = None, **settings: Any) -> Any:
    task = make_task(SearchSettings(**settings), table, config)
    return task, load_data(task.settings, task, tokenizer, {"train": table})


@pytest.mark.parametrize("name", ["label", "score"])
@pytest.mark.parametrize("as_text", [True, False])
def test_fractions_are_recognized(name: str, as_text: bool, encoder_tokenizer: Any) -> None:
    _, values = numbers()
    cells = [f"{v:.3f}" for v in values] if as_text else values
    _, data = loaded(table_of(**{name: cells}), encoder_tokenizer)
    assert data.task == "regression"
    for split in data.splits.values():
        expected = np.asarray([float(cells[row]) for row in split.source_rows], np.float32)
        assert np.array_equal(split.row_arrays["labels"], expected)
    assert data.labels == ()


def test_whole_numbers_are_classes_unless_named(encoder_tokenizer: Any) -> None:
    table = table_of(label=[i % 5 for i in range(60)])
    assert loaded(table, encoder_tokenizer)[1].task == "text-classification"
    assert loaded(table, encoder_tokenizer, task="regression")[1].task == "regression"


def test_fractions_are_no_classes(encoder_tokenizer: Any) -> None:
    late = table_of(label=[*[1.0, 2.0] * 80, 3.8])
    for table in (table_of(), Table("memory", {**late.columns, "text": ["w1"] * 161})):
        with pytest.raises(DataError, match="use --task regression"):
            loaded(table, encoder_tokenizer, task="text-classification")


@pytest.mark.parametrize("cell", ["NA", "inf", "4,5"])
def test_scores_with_other_values_are_no_classes(cell: str, encoder_tokenizer: Any) -> None:
    texts = [f"w{i}" for i in range(160)]
    cells = [cell, *(f"{i % 9 / 2:g}" for i in range(159))]
    with pytest.raises(DataError, match=r"use --task regression|finite"):
        loaded(Table("memory", {"text": texts, "label": cells}), encoder_tokenizer)
    with pytest.raises(DataError, match=r"such as 4\.5|finite"):
        loaded(
            Table("memory", {"text": texts, "label": cells}), encoder_tokenizer, task="regression"
        )
    commas = [each.replace(".", ",") for each in cells]
    with pytest.raises(DataError, match="use --task regression"):
        loaded(Table("memory", {"text": texts, "label": commas}), encoder_tokenizer)


def test_the_kind_of_a_cell_is_said_in_words(encoder_tokenizer: Any) -> None:
    rows = Table("memory", {"text": [3] * 60, "label": ["a", "b"] * 30})
    with pytest.raises(DataError, match=r"holds a number \(3\) where text is expected"):
        loaded(rows, encoder_tokenizer)


@pytest.mark.parametrize("cell", ["many", [1.0], float("inf"), True])
def test_cells_that_are_no_numbers_are_refused(cell: Any, encoder_tokenizer: Any) -> None:
    _, values = numbers()
    with pytest.raises(DataError, match="row 8"):
        loaded(
            table_of(label=[*values[:7], cell, *values[8:]]), encoder_tokenizer, task="regression"
        )


def test_missing_and_constant_numbers(encoder_tokenizer: Any) -> None:
    _, values = numbers()
    gaps: list[Any] = [None, float("nan"), "", *values[3:]]
    _, data = loaded(table_of(label=gaps), encoder_tokenizer)
    assert data.dropped == {"the label is missing": 3}
    with pytest.raises(DataError, match="all rows have the number 2"):
        loaded(table_of(label=[2.0] * 60), encoder_tokenizer, task="regression")


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_scale_is_what_the_head_can_express(name: str, encoder_tokenizer: Any) -> None:
    config = CONFIGS[name]()
    has_bias = name not in ("llama", "gpt2")
    assert has_output_bias(config, CLASS) == has_bias
    _, data = loaded(table_of(), encoder_tokenizer, config)
    values = data.train.row_arrays["labels"].astype(np.float64)
    scale = data.output_scale
    if has_bias:
        assert (scale.shift, scale.factor) == pytest.approx((values.mean(), values.std()))
    else:
        assert (scale.shift, scale.factor) == pytest.approx((0.0, np.sqrt((values**2).mean())))
    assert has_bias != any("the model's head has no bias" in note for note in data.notes)
    config.num_labels = 1
    torch.manual_seed(0)
    model = getattr(hf, CLASS).from_config(config).eval()
    head = {n: p for n, p in model.named_parameters() if "classifier" in n or "score" in n}
    rows = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 4]])}
    before = logits_of(model, **rows)
    scaled = in_unit(model, head, scale.shift, scale.factor)
    model.load_state_dict(scaled, strict=False)
    expected = before.double() * scale.factor + scale.shift
    torch.testing.assert_close(logits_of(model, **rows).double(), expected, rtol=1e-5, atol=1e-3)


def test_a_head_for_a_number_keeps_its_unit(encoder_tokenizer: Any) -> None:
    config = hf.BertConfig(**SMALL, num_labels=1, architectures=["BertForSequenceClassification"])
    assert loaded(table_of(), encoder_tokenizer, config)[1].output_scale == OutputScale()


def test_loss_is_that_of_transformers(encoder_tokenizer: Any) -> None:
    config = CONFIGS["bert"]()
    task, data = loaded(table_of(), encoder_tokenizer, config)
    task = task.bound(data)
    torch.manual_seed(0)
    for name, value in task.model_kwargs().items():
        setattr(config, name, value)
    model = hf.BertForSequenceClassification(config).eval()
    batch = collate(data, "train", np.arange(6))
    targets = (batch.labels - data.output_scale.shift) / data.output_scale.factor
    with torch.no_grad():
        whole = model(**batch.model_inputs(), labels=targets).loss
        assert float(task.loss(model, batch)) == pytest.approx(float(whole), rel=1e-6)
        parts = task.losses(model, batch, 3)
        assert float(parts.mean()) == pytest.approx(float(whole), rel=1e-6)
    found = evaluate(model, TrainingSetup(task, data), "test")
    assert set(found.metrics) == {"pearson", "spearman", "mse", "mae", "r2", "loss"}
    variance = data.output_scale.factor**2
    assert found.metrics["mse"] == pytest.approx(found.loss * variance, rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
def test_a_saved_adapter_predicts_the_unit(tiny_model: Path, tmp_path: Path) -> None:
    texts, values = numbers(120)
    path = tmp_path / "rows.csv"
    pd.DataFrame({"text": texts, "label": values}).to_csv(path, index=False)
    found = searched(tiny_model, path, tmp_path / "run", metric="mae")
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_model)
    targets = np.asarray([values[row] for row in found.test_rows])
    assert found.score["mae"] < 60.0  # The mean is 1000, which a bias of rate 1e-3 never reaches.
    batch = tokenizer([texts[r] for r in found.test_rows], padding=True, return_tensors="pt")
    for name, model in loads(found, CLASS, tmp_path / "merged").items():
        logits = logits_of(model, **batch)
        assert logits.shape == (len(targets), 1), name
        predicted = logits.squeeze(-1).double().numpy()
        assert found.score["mae"] == pytest.approx(np.abs(predicted - targets).mean(), rel=1e-5)
