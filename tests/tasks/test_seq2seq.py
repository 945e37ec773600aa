from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    T5Config,
    T5ForConditionalGeneration,
)

from autopeft.settings import SearchSettings
from autopeft.tasks.batch import collate
from autopeft.tasks.data import SPLITS, TaskData
from autopeft.tasks.examples import Examples
from autopeft.tasks.seq2seq import Seq2Seq
from autopeft.training.evaluation import evaluate
from autopeft.training.setup import TrainingSetup


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    if name == "t5":
        config = T5Config(
            vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0
        )
        config.decoder_start_token_id = 0
        return T5ForConditionalGeneration(config).eval()
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=60,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=40,
            dropout=0.0,
        )
    ).eval()


def rows_of(n: int) -> Examples:
    sources = tuple(f"w{i} film " * (1 + i % 4) for i in range(n))
    targets = tuple(f"good w{i}" * (1 + i % 2) for i in range(n))
    return Examples({"source": sources, "target": targets}, np.arange(n, dtype=np.int64), "memory")


def data_of(task: Seq2Seq, tokenizer: Any, n: int = 12) -> TaskData:
    split = task.encode(tokenizer, rows_of(n), (), 12)
    splits = dict.fromkeys(SPLITS, split)
    return TaskData(task.name, splits, (), pad_id=0, input_names=task.input_names)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_loss_is_that_of_transformers(name: str, encoder_tokenizer: Any) -> None:
    model = tiny(name)
    task = Seq2Seq().configured(SearchSettings(), model.config)
    data = data_of(task, encoder_tokenizer)
    batch = collate(data, "train", np.arange(4))
    rows = rows_of(12)
    features = [
        {
            **encoder_tokenizer(rows["source"][i], truncation=True, max_length=12),
            "labels": encoder_tokenizer(
                text_target=rows["target"][i], truncation=True, max_length=12
            )["input_ids"],
        }
        for i in range(4)
    ]
    expected = DataCollatorForSeq2Seq(encoder_tokenizer, model=model)(features)
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    is_token = expected["attention_mask"].bool()
    assert torch.equal(batch["input_ids"][is_token], expected["input_ids"][is_token])
    assert torch.equal(batch.labels, expected["labels"])
    is_learned = batch.labels != -100
    shifted = expected["decoder_input_ids"]
    assert torch.equal(batch["decoder_input_ids"][is_learned], shifted[is_learned])
    with torch.no_grad():
        whole = model(
            input_ids=expected["input_ids"],
            attention_mask=expected["attention_mask"],
            labels=expected["labels"],
        ).loss
        assert float(task.loss(model, batch)) == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_rows_are_scored_alike_in_any_batch(name: str, encoder_tokenizer: Any) -> None:
    model = tiny(name)
    task = Seq2Seq().configured(SearchSettings(), model.config)
    data = data_of(task, encoder_tokenizer)
    together = evaluate(model, TrainingSetup(task, data), "validation")
    alone = [
        evaluate(model, TrainingSetup(task, data), "validation", rows=np.asarray([i])).rows[0]
        for i in range(12)
    ]
    np.testing.assert_allclose(together.rows, alone, rtol=1e-4)
    assert set(together.metrics) == {"loss", "perplexity", "token_accuracy"}


def test_generated_text_is_that_of_one_row_at_a_time(encoder_tokenizer: Any) -> None:
    model = tiny("bart")
    task = Seq2Seq().configured(SearchSettings(), model.config)
    data = data_of(task, encoder_tokenizer)
    task.processor = encoder_tokenizer
    _, _, texts = task.generate(model, data, "test", np.arange(12), "cpu")
    for row in (0, 3, 7):
        prompt, _ = task.prompt_and_reference(data.test, row)
        alone = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=30,
            do_sample=False,
            num_beams=1,
            eos_token_id=None,
        )[0]
        expected = encoder_tokenizer.decode(alone[1:], skip_special_tokens=True)
        assert expected.startswith(texts[row])


def test_long_rows_are_cut_or_dropped_as_asked(encoder_tokenizer: Any) -> None:
    config = tiny("t5").config
    rows = rows_of(12)
    cut = Seq2Seq().configured(SearchSettings(), config).encode(encoder_tokenizer, rows, (), 7)
    n_long = sum(i % 4 > 1 for i in range(12))
    assert (len(cut), cut.n_truncated, cut.dropped) == (12, n_long, {})
    settings = SearchSettings(on_long="drop")
    left = Seq2Seq().configured(settings, config).encode(encoder_tokenizer, rows, (), 7)
    assert (left.n_truncated, left.dropped) == (0, {"longer than max_length": n_long})
    assert left.source_rows.tolist() == [i for i in range(12) if i % 4 < 2]
    assert len(left.ragged["labels"]) == len(left) == 12 - n_long
