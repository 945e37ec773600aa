from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import jiwer
import numpy as np
import pytest
import torch
import transformers as hf
from searches import loads, searched
from tones import as_array, as_bytes, name_of, tone, transcriber

from autopeft.errors import SettingsError
from autopeft.models.backbone import build_meta
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.preparing.prepare import prepare
from autopeft.profiling.fake_tensors import InputShape
from autopeft.profiling.measure import price_table
from autopeft.settings import SearchSettings
from autopeft.tasks.batch import collate
from autopeft.tasks.data import TaskData
from autopeft.tasks.load_data import load_data
from autopeft.tasks.metrics import METRICS
from autopeft.tasks.preview import preview_of
from autopeft.tasks.reading import read
from autopeft.tasks.registry import make_task

CLASS = "AutoModelForSpeechSeq2Seq"


def loaded(folder: Path, rows: Any = None, **settings: Any) -> tuple[Any, TaskData]:
    if rows is None:
        rows = [{"audio": as_array(i), "sentence": f"{name_of(i)} tone"} for i in range(40)]
    table = read("data", rows)["train"]
    config = hf.AutoConfig.from_pretrained(folder)
    task = make_task(SearchSettings(model=str(folder), **settings), table, config)
    task.processor = task.load_processor(str(folder))
    limit = task.length_limit()
    data = load_data(task.settings, task, task.processor, {"train": table}, model_limit=limit)
    return task.bound(data), data


def write_rows(path: Path, texts: list[str]) -> None:
    cells = [{"bytes": as_bytes(tone(i)), "path": None} for i in range(len(texts))]
    datasets.Dataset.from_dict({"audio": cells, "transcription": texts}).to_parquet(path)


@pytest.mark.parametrize("language", ["", "english"])
def test_loss_is_that_of_transformers(language: str, tmp_path: Path) -> None:
    folder = transcriber(tmp_path / "model")
    task, data = loaded(folder, task_options={"language": language})
    assert task.name == "transcription"
    processor = hf.AutoProcessor.from_pretrained(folder)
    if language:
        processor.tokenizer.set_prefix_tokens(language="en", task="transcribe")
    batch = collate(data, "train", np.arange(4))
    rows = data.train.source_rows[:4].tolist()
    features = processor.feature_extractor(
        [tone(row) for row in rows], sampling_rate=16_000, return_tensors="pt"
    )["input_features"]
    assert torch.equal(batch["input_features"], features)
    written = processor.tokenizer([f"{name_of(row)} tone" for row in rows])["input_ids"]
    n_prompt = 4 if language else 2
    assert processor.tokenizer.convert_ids_to_tokens(written[0][:n_prompt]) == [
        "<|startoftranscript|>",
        *(["<|en|>", "<|transcribe|>"] if language else []),
        "<|notimestamps|>",
    ]
    model = hf.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    losses = []
    for at, ids in enumerate(written):
        is_learned = batch.labels[at] != -100
        assert batch.labels[at][is_learned].tolist() == ids[1:]
        assert batch["decoder_input_ids"][at][is_learned].tolist() == ids[:-1]
        with torch.no_grad():
            one = model(features[at : at + 1], labels=torch.tensor([ids[1:]]))
        losses.append(float(one.loss) * (len(ids) - 1))
    with torch.no_grad():
        loss = float(task.loss(model, batch))
    assert loss == pytest.approx(sum(losses) / sum(len(ids) - 1 for ids in written), rel=1e-5)


def test_generated_text_is_that_of_whispers_own_generate(tmp_path: Path) -> None:
    folder = transcriber(tmp_path / "model", suppress_tokens=[40], begin_suppress_tokens=[41, 60])
    task, data = loaded(folder)
    model = hf.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    _, references, texts = task.generate(model, data, "test", np.arange(len(data.test)), "cpu")
    rows = data.test.source_rows.tolist()
    assert references == [f"{name_of(row)} tone" for row in rows]
    longest = int(data.test.ragged["labels"].lengths.max())
    for row, text in zip(rows[:3], texts, strict=False):
        features = task.processor.feature_extractor(
            tone(row), sampling_rate=16_000, return_tensors="pt"
        )["input_features"]
        prompt = torch.tensor([task.processor.tokenizer.prefix_tokens])
        with torch.inference_mode():
            ids = model.generate(features, decoder_input_ids=prompt, max_new_tokens=longest + 8)
        expected = task.processor.decode(ids[0], skip_special_tokens=True).strip()
        assert text == expected


def test_generation_with_a_cache_that_breaks_is_noticed(tmp_path: Path) -> None:
    folder = transcriber(tmp_path / "model")
    task, data = loaded(folder)
    model = hf.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    rows = np.arange(len(data.test))
    plain = task.generate(model, data, "test", rows, "cpu")

    def forgetful(_: Any, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] > 1:
            return None
        return (-hidden, *output[1:]) if isinstance(output, tuple) else -hidden

    model.model.decoder.layers[-1].register_forward_hook(forgetful)
    with pytest.warns(UserWarning, match="generation with a cache is off"):
        assert task.generate(model, data, "test", rows, "cpu") == plain


def test_sounds_longer_than_the_model_hears_are_dropped_and_long_texts_cut(tmp_path: Path) -> None:
    rows: list[Any] = [{"audio": as_array(i), "text": name_of(i)} for i in range(40)]
    rows[3]["audio"] = {"array": np.tile(tone(3), 4), "sampling_rate": 16_000}
    rows[5]["text"] = "a high tone " * 9
    folder = transcriber(tmp_path / "model")
    _, data = loaded(folder, rows)
    assert data.dropped == {"longer than 1 s of sound": 1}
    assert (data.n_truncated, data.max_length) == (1, 40)
    labels = [split.ragged["labels"] for split in data.splits.values()]
    assert max(int(each.lengths.max()) for each in labels) == 39
    _, data = loaded(folder, rows, on_long="drop")
    assert data.dropped == {"longer than 1 s of sound": 1, "longer than max_length": 1}
    assert data.n_truncated == 0


@pytest.mark.parametrize(
    ("is_multilingual", "language", "words"),
    [
        (True, "", "must be told which"),
        (True, "klingon", "no such language"),
        (False, "en", "knows one language"),
    ],
)
def test_languages_are_asked_for_where_there_are_several(
    is_multilingual: bool, language: str, words: str, tmp_path: Path
) -> None:
    folder = transcriber(tmp_path / "model", is_multilingual=is_multilingual)
    with pytest.raises(SettingsError, match=words) as raised:
        loaded(folder, task_options={"language": language})
    assert "\n" not in str(raised.value)


def test_error_rates_are_those_of_all_words() -> None:
    references, texts = ["a b c d", "e"], ["a b x d", "f"]
    wer, cer = (METRICS.resolve("metric", name) for name in ("wer", "cer"))
    assert wer.direction == cer.direction == "minimize"
    assert wer.function is not None
    assert cer.function is not None
    assert wer.function(None, references, texts) == pytest.approx(2 / 5)
    assert cer.function(None, references, texts) == pytest.approx(2 / 8)


def test_previews_show_sound_and_transcript(tmp_path: Path) -> None:
    task, data = loaded(transcriber(tmp_path / "model"))
    row = preview_of(data, task).rows[0]
    assert row.inputs[0][0] == "audio"
    assert row.inputs[0][1].endswith(" s at 16000 Hz")
    assert row.inputs[1] == ("input_features", "8 x 100")
    (text,) = row.sequences
    assert text.name == "text"
    assert text.pieces[0].text == f"<|notimestamps|>{name_of(row.source_row)} tone<|endoftext|>"


def test_prices_are_of_the_sounds_and_the_transcripts(tmp_path: Path) -> None:
    folder = transcriber(tmp_path / "model")
    _, data = loaded(folder)
    lengths = data.length_statistics(4)
    assert (lengths.mean_padded, lengths.source_share) == (50, 1.0)
    assert lengths.target_share == pytest.approx(11 / 50)
    meta = build_meta(str(folder), auto_class=CLASS)
    roles = {role for _, role in meta.layout.modules}
    assert {"attn.q", "cross.k", "cross.v", "mlp.up", "mlp.down"} <= roles
    assert not meta.layout.unsearched
    short, long = (
        price_table(
            meta,
            batch_size=2,
            mean_length=50,
            longest_length=50,
            inputs=InputShape(data.input_shapes, 1.0, share),
        )
        for share in (0.2, 0.8)
    )
    encoder, decoder = short.kinds[0], short.kinds[-1]
    assert long.blocks[encoder].forward_flops == short.blocks[encoder].forward_flops
    assert long.blocks[decoder].forward_flops > 2 * short.blocks[decoder].forward_flops


def test_logits_of_a_decoder_beside_an_encoder_are_all_paid_for(tmp_path: Path) -> None:
    folder = transcriber(tmp_path / "model")
    path = tmp_path / "rows.parquet"
    write_rows(path, [name_of(i) for i in range(40)])
    ready = prepare(SearchSettings(model=str(folder), data=str(path), budget="4trials", workers=1))
    plan = AdapterPlan([LayerSpec(3, "attn.q", "lora", 2)])
    step = ready.prices.price(Candidate(plan, TrainSettings(1e-3, steps=1, batch_size=32)))
    assert step.train_flops > ready.prices.forward_flops * 32 / ready.prices.batch_size


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
def test_a_saved_adapter_writes_alike_from_outside(tmp_path: Path) -> None:
    folder = transcriber(tmp_path / "model")
    texts = [f"{name_of(i)} {'abc'[i % 3]}" for i in range(60)]
    path = tmp_path / "rows.parquet"
    write_rows(path, texts)
    found = searched(folder, path, tmp_path / "run", metric="wer", steps=40)
    assert {"loss", "perplexity", "token_accuracy", "wer"} <= set(found.score)
    processor = hf.AutoProcessor.from_pretrained(folder)
    tokenizer = processor.tokenizer
    longest = max(len(texts[row]) for row in found.test_rows) + 2 + 8
    for how, loaded_model in loads(found, CLASS, tmp_path / "merged").items():
        loss, n_tokens, written = 0.0, 0, []
        for row in found.test_rows:
            features = processor.feature_extractor(
                tone(row), sampling_rate=16_000, return_tensors="pt"
            )["input_features"]
            labels = torch.tensor([tokenizer(texts[row])["input_ids"][1:]])
            with torch.inference_mode():
                given = {"input_features": features}
                loss += float(loaded_model(**given, labels=labels).loss) * labels.shape[1]
                prompt = torch.tensor([tokenizer.prefix_tokens])
                ids = loaded_model.generate(
                    **given, decoder_input_ids=prompt, max_new_tokens=longest, do_sample=False
                )[0]
            n_tokens += labels.shape[1]
            written.append(processor.decode(ids, skip_special_tokens=True).strip())
        assert found.score["loss"] == pytest.approx(loss / n_tokens, rel=1e-5), how
        rate = jiwer.wer([texts[row] for row in found.test_rows], written)
        assert found.score["wer"] == pytest.approx(rate), how
    assert hf.AutoProcessor.from_pretrained(tmp_path / "merged") is not None
