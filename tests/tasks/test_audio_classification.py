from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import scipy.signal
import torch
import transformers as hf
from covering import usual_first
from searches import loads, logits_of, searched
from tones import MODELS, as_array, as_bytes, name_of, save, tone, write_folder

from autopeft.errors import DataError, ModelError
from autopeft.models.backbone import build_meta
from autopeft.profiling.fake_tensors import InputShape
from autopeft.profiling.measure import price_table
from autopeft.settings import SearchSettings
from autopeft.tasks import encoding, sounds
from autopeft.tasks.batch import collate
from autopeft.tasks.data import SplitName, TaskData
from autopeft.tasks.load_data import load_data
from autopeft.tasks.preview import preview_of
from autopeft.tasks.reading import Table, read
from autopeft.tasks.registry import make_task

CLASS = "AutoModelForAudioClassification"


def table_of(n: int = 40, **changed: Any) -> Table:
    rows = [{"audio": changed.get(f"at{i}", as_array(i)), "label": name_of(i)} for i in range(n)]
    return read("data", rows)["train"]


def loaded(table: Table, name: str = "wav2vec2", **settings: Any) -> tuple[Any, TaskData]:
    config, extractor = MODELS[name]
    task = make_task(SearchSettings(model="tiny", **settings), table, config())
    task.processor = extractor()
    limit = task.length_limit()
    data = load_data(task.settings, task, task.processor, {"train": table}, model_limit=limit)
    return task.bound(data), data


@pytest.mark.parametrize("name", sorted(MODELS))
def test_inputs_are_those_of_the_models_own_extractor(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / "model")
    task, data = loaded(table_of(), name)
    extractor = task.load_processor(str(folder))
    n_samples = 320 * data.max_length
    longest = (
        {"padding": "max_length", "max_length": n_samples}
        if "input_values" in data.train.row_arrays and name != "ast"
        else {}
    )
    for split in ("train", "validation", "test"):
        batch = collate(data, split, np.arange(4))
        for at, row in enumerate(data.splits[split].source_rows[:4].tolist()):
            alone = extractor(tone(row), sampling_rate=16_000, return_tensors="pt", **longest)
            for key, value in alone.items():
                assert torch.equal(batch[key][at], value[0])
    model = getattr(hf, CLASS).from_pretrained(folder, **task.model_kwargs()).eval()
    batch = collate(data, "train", np.arange(6))
    with torch.no_grad():
        whole = model(**batch.model_inputs(), labels=batch.labels).loss
        assert float(task.loss(model, batch)) == pytest.approx(float(whole), rel=1e-6)


def test_files_bytes_and_arrays_are_the_same_sounds(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tones", 40)
    whole = read("data", str(folder))["train"]
    raw = [{"bytes": as_bytes(tone(i)), "path": f"{i}.wav"} for i in range(40)]
    plain = datasets.Dataset.from_dict({"audio": raw, "label": [name_of(i) for i in range(40)]})
    marked = plain.cast_column("audio", datasets.Audio(decode=False))
    plain.to_parquet(tmp_path / "plain.parquet")
    marked.to_parquet(tmp_path / "marked.parquet")
    sources = [whole, read("data", marked)["train"]]
    sources += [read("data", str(tmp_path / f"{n}.parquet"))["train"] for n in ("plain", "marked")]
    bare = [{"audio": cell["bytes"], "label": name_of(i)} for i, cell in enumerate(raw)]
    sources.append(read("data", bare)["train"])
    keys = []
    for table in sources:
        task = make_task(SearchSettings(), table, MODELS["hubert"][0]())
        task.processor = MODELS["hubert"][1]()
        assert task.name == "audio-classification"
        keys.append(set(task.clean(table)["key"]))
    assert len(keys[0]) == 40
    assert all(each == keys[0] for each in keys)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # datasets leaves the file open
def test_folders_with_metadata_name_their_own_columns(tmp_path: Path) -> None:
    folder = tmp_path / "tones"
    (folder / "train").mkdir(parents=True)
    lines = ["file_name,emotion"]
    for i in range(8):
        (folder / "train" / f"{i}.flac").write_bytes(as_bytes(tone(i), kind="FLAC"))
        lines.append(f"{i}.flac,{name_of(i)}")
    (folder / "train" / "metadata.csv").write_text("\n".join(lines) + "\n")
    table = read("data", str(folder))["train"]
    task = make_task(SearchSettings(), table, MODELS["wav2vec2"][0]())
    task.processor = MODELS["wav2vec2"][1]()
    rows = task.clean(table)
    assert rows["label"] == tuple(map(name_of, range(8)))
    assert rows["about"][1] == "0.37 s at 16000 Hz"
    gc.collect()


def test_files_that_a_table_names_are_read_relative_to_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tones")
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".wav", ".flac", ".ogg"))
    lines = [f"{path.relative_to(folder)},{path.parent.name}" for path in files]
    (folder / "table.csv").write_text("\n".join(["audio_path,label", *lines]))
    table = read("data", str(folder / "table.csv"))["train"]
    _, data = loaded(table)
    assert (data.columns["audio"], sum(map(len, data.splits.values()))) == (
        "audio_path",
        len(files),
    )


def test_other_rates_and_channels_are_changed_and_said() -> None:
    stereo = np.stack([tone(2), np.zeros_like(tone(2))])
    table = table_of(
        at0=as_array(0, 8_000),
        at1=as_array(1, 44_100),
        at2={"array": stereo, "sampling_rate": 16_000},
        at3={"array": (tone(3) * 32_768).astype(np.int16), "sampling_rate": 16_000},
    )
    _, data = loaded(table)
    assert (
        "2 of 40 sounds of list are resampled to the model's 16000 Hz (from 8000, 44100 Hz)"
        in data.notes
    )
    assert "1 of 40 sounds of list have several channels: their mean is used" in data.notes
    for row, rate in ((0, 8_000), (1, 44_100)):
        given = sounds.samples_at(as_array(row, rate), 16_000, 1_000_000)
        times = np.arange(len(given)) / 16_000
        right = 0.3 * np.sin(2 * np.pi * (880 if row else 220) * times)
        assert len(given) == pytest.approx(len(tone(row)), abs=1)
        assert np.corrcoef(given[500:-500], right[500:-500])[0, 1] > 0.98
    assert np.allclose(sounds.samples_at(table.columns["audio"][2], 16_000, 1_000_000), tone(2) / 2)
    assert np.allclose(
        sounds.samples_at(table.columns["audio"][3], 16_000, 1_000_000), tone(3), atol=1e-4
    )


def test_equal_sounds_are_one_whatever_their_file() -> None:
    rows = [
        {"audio": as_bytes(as_16_bits(tone(i)), kind=kind), "label": name_of(i)}
        for i in range(30)
        for kind in ("WAV", "FLAC")
    ]
    _, data = loaded(read("data", rows)["train"])
    seen = [{row // 2 for row in split.source_rows.tolist()} for split in data.splits.values()]
    assert sum(map(len, seen)) == 30


def as_16_bits(samples: Any) -> Any:
    return np.round(samples * 32_767).astype(np.int16)


@pytest.mark.parametrize("on_long", ["cut", "drop"])
def test_long_sounds_are_cut_or_dropped_as_asked(on_long: str) -> None:
    long: Any = {
        f"at{i}": {"array": np.tile(tone(i), 4), "sampling_rate": 16_000} for i in range(4)
    }
    _, data = loaded(table_of(**long), on_long=on_long, max_length=25)
    assert data.train.row_arrays["input_values"].shape[1] == 25 * 320
    n_rows = sum(map(len, data.splits.values()))
    if on_long == "cut":
        assert (n_rows, data.n_truncated) == (40, 4)
    else:
        assert (n_rows, data.dropped["longer than max_length"]) == (36, 4)


def test_longer_sounds_of_other_splits_are_not_cut_by_default() -> None:
    longer = {f"at{i}": {"array": np.tile(tone(i), 2), "sampling_rate": 16_000} for i in range(20)}
    task, data = loaded(table_of(60))
    given: dict[SplitName, Table] = {"train": table_of(60), "test": table_of(20, **longer)}
    both = load_data(task.settings, task, task.processor, given)
    assert both.max_length > data.max_length
    assert both.n_truncated == 0


def test_a_few_very_long_sounds_do_not_set_the_length_of_all() -> None:
    long: Any = {"at7": {"array": np.tile(tone(7), 40), "sampling_rate": 16_000}}
    _, data = loaded(table_of(200, **long))
    assert data.max_length == 24
    assert data.n_truncated == 1
    assert all(s.row_arrays["input_values"].shape[1] == 24 * 320 for s in data.splits.values())


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (as_bytes(tone(0))[:30], "is not a readable sound"),
        (b"RIFF....WAVE nothing", "is not a readable sound"),
        ({"bytes": None, "path": "nowhere.wav"}, "No such file"),
        ("clips/3.wav", "a str"),
        ({"array": tone(0)}, "sampling_rate is None"),
        ({"array": [1, 2, 3], "sampling_rate": 16_000}, "an array of int64"),
        ({"array": np.full(9, np.nan), "sampling_rate": 16_000}, "not finite"),
        ({"array": 20_000 * tone(0), "sampling_rate": 16_000}, "between -1 and 1"),
        ({"array": np.zeros(0, np.float32), "sampling_rate": 16_000}, "no samples"),
    ],
)
def test_what_is_no_sound_names_its_row(cell: Any, words: str) -> None:
    with pytest.raises(DataError) as raised:
        loaded(table_of(at6=cell), task="audio-classification")
    message = str(raised.value)
    assert "row 7 of list is not a readable sound" in message
    assert words in message
    assert "\n" not in message


def test_files_without_the_package_that_reads_them_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(DataError, match=r"need the package soundfile; pip install autopeft\[audio"):
        loaded(table_of(at6=as_bytes(tone(6))))


def test_sounds_that_do_not_fit_into_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "available_memory_bytes", lambda: 1000)
    with pytest.raises(DataError, match="its sounds need"):
        loaded(table_of())


def test_models_that_cannot_transcribe_are_refused_in_one_line() -> None:
    rows = [{"audio": as_array(i), "text": name_of(i)} for i in range(40)]
    with pytest.raises(ModelError) as raised:
        make_task(SearchSettings(model="tiny"), read("data", rows)["train"], MODELS["hubert"][0]())
    assert "hubert" in str(raised.value)
    assert "transcription" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_previews_show_length_and_rate() -> None:
    task, data = loaded(table_of(at0=as_array(0, 8_000)))
    rows = {row.source_row: row for row in preview_of(data, task, 40).rows}
    assert rows[1].inputs[0] == ("audio", "0.37 s at 16000 Hz") if 1 in rows else True
    assert all(row.target == name_of(number) for number, row in rows.items())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_all_linear_modules_of_the_blocks_are_found_and_priced(name: str, tmp_path: Path) -> None:
    _, data = loaded(table_of(), name)
    meta = build_meta(
        str(save(name, tmp_path / "model")), auto_class=CLASS, model_kwargs={"num_labels": 2}
    )
    roles = {role for _, role in meta.layout.modules}
    assert {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"} <= roles
    assert not meta.layout.unsearched
    table, twice = (
        price_table(
            meta,
            batch_size=n,
            mean_length=1,
            longest_length=1,
            inputs=InputShape(data.input_shapes),
        )
        for n in (2, 4)
    )
    assert twice.forward_flops == pytest.approx(2 * table.forward_flops, rel=0.01)
    if "wav2vec2" in name:  # Its frozen convolutions, most of the work, have no backward pass.
        assert table.head_only.backward_flops < 0.05 * table.forward_flops


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", usual_first(sorted(MODELS), "wav2vec2", "whisper"))
def test_a_saved_adapter_scores_alike_from_outside(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path / "model")
    folder = write_folder(tmp_path / "tones")
    found = searched(model, folder, tmp_path / "run")
    files = read("data", str(folder))["train"]
    extractor = hf.AutoFeatureExtractor.from_pretrained(model)
    labels = json.loads((found.adapter / "plan.json").read_text())["model_kwargs"]["label2id"]
    clips = [sounds.decoded(files.columns["audio"][row]).samples for row in found.test_rows]
    is_raw = isinstance(extractor, hf.Wav2Vec2FeatureExtractor)
    options: Any = {"padding": "max_length", "max_length": 24 * 320} if is_raw else {}
    inputs = extractor(clips, sampling_rate=16_000, return_tensors="pt", **options)
    targets = torch.tensor([labels[files.columns["label"][r]] for r in found.test_rows])
    for how, loaded_model in loads(found, CLASS, tmp_path / "merged").items():
        logits = logits_of(loaded_model, **inputs)
        right = (logits.argmax(dim=1) == targets).double().mean()
        assert found.score["accuracy"] == pytest.approx(float(right)), how
        loss = torch.nn.functional.cross_entropy(logits.double(), targets)
        assert found.score["loss"] == pytest.approx(float(loss), rel=1e-5), how
    assert hf.AutoFeatureExtractor.from_pretrained(tmp_path / "merged") is not None


@pytest.mark.parametrize("rate", [1, 7, 8_000, 16_001, 44_100, 96_000])
def test_of_a_long_sound_only_what_is_wanted_is_resampled(
    monkeypatch: pytest.MonkeyPatch, rate: int
) -> None:
    """Regression: a header that says 1 Hz made 16,000 samples of each, before all were cut."""
    samples = np.random.default_rng(0).normal(size=20_000).astype(np.float32) / 10
    seen, resample = [], scipy.signal.resample_poly

    def noted(given: Any, up: int, down: int) -> Any:
        seen.append(len(given) * up // down)
        return resample(given, up, down)

    monkeypatch.setattr(scipy.signal, "resample_poly", noted)
    cell = {"array": samples, "sampling_rate": rate}
    found = sounds.samples_at(cell, 16_000, 3_000)
    # More than the filter reaches, and less than all where each sample becomes 16,000.
    many = samples[: 3_000 * rate // 16_000 + 300]
    whole = resample(many, 16_000, rate).astype(np.float32)[:3_000]
    assert np.array_equal(found, whole)
    assert seen[0] < 200_000 + 3_000


def test_a_rate_that_nothing_records_is_refused() -> None:
    cell = {"array": np.zeros(9), "sampling_rate": 2_000_000_000}
    with pytest.raises(ValueError, match="rate is 2000000000 Hz, but must be at most 1000000"):
        sounds.samples_at(cell, 16_000, 100)
