from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef
from torch.nn import functional

from autopeft.tasks.data import IGNORED, TaskData
from autopeft.tasks.sft import SupervisedFineTuning
from autopeft.tasks.text_classification import TextClassification
from autopeft.training import evaluation
from autopeft.training.evaluation import evaluate
from autopeft.training.setup import TrainingSetup

Build = Callable[..., Any]


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(evaluation.TOKEN_BUDGET, "cpu", 64)


def test_classification_agrees_with_row_by_row(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    model = bert_with_lora().model
    task = TextClassification(classification_data.labels, 0)
    found = evaluate(model, TrainingSetup(task, classification_data), "validation")
    split = classification_data.validation
    targets = split.row_arrays["labels"]
    losses, predictions = [], []
    with torch.no_grad():
        for i in range(len(split)):
            tokens = torch.tensor(split.tokens[split.offsets[i] : split.offsets[i + 1]])[
                None
            ].long()
            logits = model(input_ids=tokens).logits
            losses.append(float(functional.cross_entropy(logits, torch.tensor([targets[i]]))))
            predictions.append(int(logits.argmax()))
    right = np.asarray(predictions) == targets
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    np.testing.assert_array_equal(found.rows, right.astype(float))
    assert found.metrics["accuracy"] == pytest.approx(right.mean())
    assert found.metrics["f1"] == pytest.approx(
        f1_score(targets, predictions, average="macro", zero_division=0.0)
    )
    assert found.metrics["matthews"] == pytest.approx(matthews_corrcoef(targets, predictions))
    by_loss = TextClassification(classification_data.labels, 0, "loss")
    rows = evaluate(model, TrainingSetup(by_loss, classification_data), "validation").rows
    np.testing.assert_allclose(rows, -np.asarray(losses), rtol=1e-4)


def test_causal_lm_agrees_with_all_logits(causal_data: TaskData, llama_with_lora: Build) -> None:
    model = llama_with_lora().model
    found = evaluate(model, TrainingSetup(SupervisedFineTuning(), causal_data), "test")
    split = causal_data.test
    row_losses, n_right = [], 0.0
    with torch.no_grad():
        for i in range(len(split)):
            tokens = torch.tensor(split.tokens[split.offsets[i] : split.offsets[i + 1]]).long()
            logits = model(input_ids=tokens[None]).logits[0]
            labels = split.token_arrays["labels"][split.offsets[i] : split.offsets[i + 1]]
            start = int((labels == IGNORED).sum())
            wanted = tokens[start:]
            row_losses.append(float(functional.cross_entropy(logits[start - 1 : -1], wanted)))
            n_right += float((logits[start - 1 : -1].argmax(-1) == wanted).sum())
    assert found.loss == pytest.approx(np.mean(row_losses), rel=1e-5)  # two tokens a row
    np.testing.assert_allclose(found.rows, -np.asarray(row_losses), rtol=1e-4)
    assert found.metrics["perplexity"] == pytest.approx(np.exp(found.loss))
    assert found.metrics["token_accuracy"] == pytest.approx(n_right / (2 * len(split)))


def test_logits_are_computed_for_completions_only(
    causal_data: TaskData, llama_with_lora: Build
) -> None:
    model = llama_with_lora().model
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[:-1].numel()))
    evaluate(model, TrainingSetup(SupervisedFineTuning(), causal_data), "validation")
    assert sum(seen) == 2 * len(causal_data.validation)


def test_decoder_classifies_by_its_last_real_token(classification_data: TaskData) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    data = replace(classification_data, pad_id=39)  # a real word, too, as where it is the end
    task = TextClassification(data.labels, data.pad_id)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        **task.model_kwargs(),
    )
    model = LlamaForSequenceClassification(config)
    assert config.num_labels == 2
    batched = evaluate(model, TrainingSetup(task, data), "test")
    evaluation.TOKEN_BUDGET["cpu"] = 1  # one row a batch: no padding at all
    alone = evaluate(model, TrainingSetup(task, data), "test")
    assert batched.loss == pytest.approx(alone.loss, rel=1e-5)


def test_unknown_metric() -> None:
    from autopeft.errors import SettingsError

    with pytest.raises(SettingsError, match="metric='bleu': not measured by sft"):
        SupervisedFineTuning(metric="bleu")


def test_logits_bound_the_tokens_of_a_batch() -> None:
    accelerator = max(evaluation.TOKEN_BUDGET.values())
    (device,) = (name for name, n in evaluation.TOKEN_BUDGET.items() if n == accelerator)
    device = "cuda" if device == "accelerator" else device
    assert evaluation.token_budget(device) == accelerator
    assert evaluation.token_budget(device, 128_256) * 128_256 * 4 <= 2 * 2**30
    assert evaluation.token_budget("cpu", 49_152) == evaluation.TOKEN_BUDGET["cpu"]


@pytest.mark.parametrize("room", [1, 2, 3])
def test_a_batch_without_room_is_halved_until_it_fits(
    room: int, causal_data: TaskData, llama_with_lora: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task, sizes = llama_with_lora().model, SupervisedFineTuning(), list[int]()
    whole = evaluate(model, TrainingSetup(task, causal_data), "validation")
    score = task.score

    def crowded(model: Any, batch: Any) -> Any:
        if len(batch.rows) > room:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(len(batch.rows))
        return score(model, batch)

    monkeypatch.setattr(task, "score", crowded)
    found = evaluate(model, TrainingSetup(task, causal_data), "validation")
    np.testing.assert_allclose(found.rows, whole.rows, rtol=1e-5)
    assert sum(sizes) == len(causal_data.validation)
    monkeypatch.setattr(task, "score", lambda *_: crowded(model, _Crowd()))
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(model, TrainingSetup(task, causal_data), "validation")


class _Crowd:
    rows = range(99)
