from __future__ import annotations

import dataclasses
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from covering import usual_first
from searches import loads, searched
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    MBartConfig,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from autopeft.errors import DataError, ModelError
from autopeft.models.backbone import build_meta
from autopeft.profiling.fake_tensors import InputShape
from autopeft.profiling.measure import price_table
from autopeft.settings import SearchSettings
from autopeft.tasks.batch import collate
from autopeft.tasks.data import SPLITS, Ragged, TaskData
from autopeft.tasks.examples import Examples
from autopeft.tasks.reading import Table, read
from autopeft.tasks.registry import make_task
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


@pytest.mark.parametrize(("end", "told"), [("[SEP]", False), (None, True), ("film", True)])
def test_targets_without_an_end_token_are_told(
    end: str | None, told: bool, encoder_tokenizer: Any
) -> None:
    encoder_tokenizer.eos_token = end
    task = Seq2Seq().configured(SearchSettings(), tiny("t5").config)
    notes = task.encode(encoder_tokenizer, rows_of(12), (), 12).notes
    assert any("12 of 12 targets have no end token" in note for note in notes) is told


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


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("instruction", "input", "output"), ["good film\n\nw1", "bad"]),
        (("question", "context", "answer"), ["good film\n\nw1", "bad"]),
        (("input", "unknown", "output"), ["good film", "bad"]),
    ],
)
def test_what_an_instruction_is_about_stands_behind_it(
    names: tuple[str, ...], expected: list[str], encoder_tokenizer: Any
) -> None:
    cells = (["good film", "bad"], ["w1", None], ["w2", "w3"])
    table = Table("memory", dict(zip(names, cells, strict=True)))
    task = make_task(SearchSettings(), table, tiny("t5").config)
    split = task.encode(encoder_tokenizer, task.clean(table), (), 30)
    assert [split.tokens[a:b].tolist() for a, b in pairwise(split.offsets)] == [
        encoder_tokenizer(text)["input_ids"] for text in expected
    ]


TRANSLATIONS = [{"translation": {"en": f"good w{i}", "de": f"w{i} film"}} for i in range(20)]


@pytest.mark.parametrize("container", ["list", "csv", "jsonl", "dataset"])
@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (None, ("en", "de")),
        ({"source": "de", "target": "en"}, ("de", "en")),
        ({"source": "de"}, ("de", "en")),
        ({"target": "en"}, ("de", "en")),
    ],
)
def test_translations_are_read_in_the_direction_asked_for(
    container: str, columns: Any, expected: tuple[str, str], tmp_path: Path
) -> None:
    data: Any = TRANSLATIONS
    if container == "dataset":
        data = datasets.Dataset.from_list(
            TRANSLATIONS,
            features=datasets.Features({"translation": datasets.Translation(["en", "de"])}),
        )
        if columns is None:
            expected = ("de", "en")  # `datasets` sorts the languages.
    elif container != "list":
        frame = pd.DataFrame(TRANSLATIONS)
        data = str(tmp_path / f"d.{container}")
        if container == "csv":
            frame.to_csv(data, index=False)
        else:
            frame.to_json(data, orient="records", lines=True)
    table = read("data", data)["train"]
    task = make_task(SearchSettings(columns=columns), table, T5Config())
    assert task.name == "seq2seq"
    rows = task.clean(table)
    assert len(rows) == 20
    for role, language in zip(("source", "target"), expected, strict=True):
        assert rows[role] == tuple(row["translation"][language] for row in TRANSLATIONS)
    is_told = any("is read and" in note for note in rows.notes)
    assert is_told == (len(columns or {}) < 2)


def test_rows_that_lack_a_language_are_dropped_and_counted() -> None:
    rows: list[Any] = [*TRANSLATIONS, {"translation": {"en": "good", "de": None}}]
    table = read("data", rows)["train"]
    task = make_task(SearchSettings(), table, T5Config())
    assert task.clean(table).dropped == {"the target is missing": 1}
    table = read("data", [{"translation": {"en": f"w{i}"}} for i in range(20)])["train"]
    with pytest.raises(DataError, match=r"target=.*--columns target=NAME"):
        make_task(SearchSettings(task="seq2seq"), table, T5Config()).clean(table)


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


def test_generation_with_a_cache_that_breaks_is_noticed(encoder_tokenizer: Any) -> None:
    model = tiny("bart")
    task = Seq2Seq().configured(SearchSettings(), model.config)
    data = data_of(task, encoder_tokenizer)
    task.processor = encoder_tokenizer
    plain = task.generate(model, data, "test", np.arange(12), "cpu")

    def forgetful(_: Any, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] > 1:
            return None
        return (-hidden, *output[1:]) if isinstance(output, tuple) else -hidden

    model.model.decoder.layers[-1].register_forward_hook(forgetful)
    with pytest.warns(UserWarning, match="generation with a cache is off"):
        assert task.generate(model, data, "test", np.arange(12), "cpu")[0] == plain[0]


def test_models_that_name_no_first_token_are_refused_in_one_line(encoder_tokenizer: Any) -> None:
    task = Seq2Seq().configured(SearchSettings(model="mbart"), MBartConfig())
    with pytest.raises(ModelError, match="names no decoder_start_token_id") as raised:
        data_of(task, encoder_tokenizer)
    assert "\n" not in str(raised.value)


def test_a_target_without_a_token_is_dropped_and_counted(decoder_tokenizer: Any) -> None:
    rows = rows_of(4)
    columns = {**rows.columns, "target": ("good w1", "", "good", "good w1")}
    task = Seq2Seq().configured(SearchSettings(), T5Config(decoder_start_token_id=0))
    split = task.encode(decoder_tokenizer, dataclasses.replace(rows, columns=columns), (), 12)
    assert split.dropped == {"the target has no token": 1}
    assert split.source_rows.tolist() == [0, 2, 3]
    inputs, labels = split.ragged["decoder_input_ids"], split.ragged["labels"]
    starts = inputs.values[inputs.offsets[:-1]]
    assert starts.tolist() == [0, 0, 0]
    assert len(inputs.values) == len(labels.values)


def test_a_row_that_is_cut_twice_counts_once(encoder_tokenizer: Any) -> None:
    model = tiny("t5")
    rows = Examples({"source": ("w1 " * 30,) * 4, "target": ("w2 " * 30,) * 4}, np.arange(4), "m")
    for on_long, n_cut, n_rows in (("cut", 4, 4), ("drop", 0, 0)):
        task = Seq2Seq().configured(SearchSettings(on_long=on_long), model.config)
        split = task.encode(encoder_tokenizer, rows, (), 12)
        assert (split.n_truncated, len(split)) == (n_cut, n_rows)
        assert sum(split.dropped.values()) == 4 - n_rows
        end = encoder_tokenizer.sep_token_id
        assert all(split.ragged["labels"].values[split.ragged["labels"].offsets[1:] - 1] == end)


def test_short_targets_make_a_decoder_cheap(encoder_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny("t5")
    model.save_pretrained(tmp_path)
    task = Seq2Seq().configured(SearchSettings(), model.config)
    rows = Examples({"source": ("w1 " * 38,) * 8, "target": ("w2 " * 8,) * 8}, np.arange(8), "m")
    split = task.encode(encoder_tokenizer, rows, (), 64)
    data = TaskData(task.name, dict.fromkeys(SPLITS, split), (), 0, task.input_names)
    lengths = data.length_statistics(4)
    assert (lengths.mean_padded, lengths.source_share, lengths.target_share) == (40, 1.0, 0.25)
    meta = build_meta(str(tmp_path), auto_class=task.auto_class)
    at_full, at_share = (
        price_table(meta, batch_size=2, mean_length=40, longest_length=40, inputs=inputs)
        for inputs in (InputShape(), InputShape({}, 1.0, 0.25))
    )
    encoder, decoder = at_full.kinds[0], at_full.kinds[-1]
    flops = [[t.blocks[i].forward_flops for t in (at_full, at_share)] for i in (encoder, decoder)]
    assert flops[0][0] == flops[0][1]
    assert flops[1][1] < 0.5 * flops[1][0]
    assert isinstance(split.ragged["labels"], Ragged)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", usual_first(["t5", "mt5", "bart"], "t5", "bart"))
def test_a_saved_adapter_writes_alike_from_outside(
    name: str, encoder_tokenizer: Any, tmp_path: Path
) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    chooser = random.Random(0)
    words = [f"w{i}" for i in range(30)]
    sources = [" ".join(chooser.choices(words, k=chooser.randint(2, 6))) for _ in range(80)]
    targets = [" ".join(reversed(source.split())) for source in sources]
    path = tmp_path / "rows.jsonl"
    rows = zip(sources, targets, strict=True)
    path.write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in rows))
    tokenizer = encoder_tokenizer
    tokenizer.eos_token = "[SEP]"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    ids = {"pad_token_id": 1, "eos_token_id": 3, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    if name == "bart":
        config: Any = tiny("bart").config
        config.update({**ids, "bos_token_id": 2, "decoder_start_token_id": 3})
        model: Any = BartForConditionalGeneration(config)
        model.generation_config.update(min_length=5, no_repeat_ngram_size=3)
    else:
        size = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        kinds = {"t5": (T5Config, T5ForConditionalGeneration)}
        kinds["mt5"] = (MT5Config, MT5ForConditionalGeneration)
        make, kind = kinds[name]
        model = kind(make(**size, **ids, decoder_start_token_id=1))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = searched(
        tmp_path / "model",
        path,
        tmp_path / "run",
        metric="rougeL",
        steps=40,
        space={"methods": {"lora": {"ranks": [2, 4]}}, "min_adapted_layers": 4},
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert {"loss", "perplexity", "token_accuracy", "rougeL"} <= set(found.score)
    longest = max(len(targets[row].split()) for row in found.test_rows) + 1
    scorer = RougeScorer(["rougeL"])
    for how, loaded in loads(found, "AutoModelForSeq2SeqLM", tmp_path / "merged").items():
        quality, loss, n_tokens = [], 0.0, 0
        for row in found.test_rows:
            given = tokenizer(sources[row], return_tensors="pt")
            labels = tokenizer(text_target=targets[row], return_tensors="pt")["input_ids"]
            with torch.inference_mode():
                loss += float(loaded(**given, labels=labels).loss) * labels.shape[1]
                n_tokens += labels.shape[1]
                ids_written = loaded.generate(
                    **given,
                    max_new_tokens=longest + 8,
                    do_sample=False,
                    num_beams=1,
                    min_length=0,
                    no_repeat_ngram_size=0,
                )[0]
            text = tokenizer.decode(ids_written, skip_special_tokens=True)
            quality.append(scorer.score(targets[row], text)["rougeL"].fmeasure)
        assert found.score["loss"] == pytest.approx(loss / n_tokens, rel=1e-5), how
        assert found.score["rougeL"] == pytest.approx(np.mean(quality)), how
