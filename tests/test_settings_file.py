"""`autopeft init`: for every task and source, a commented file that can be used as it is."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from PIL import Image

import autopeft
from autopeft.errors import StorageError
from autopeft.tasks.registry import TASKS

WORDS = ("good", "bad", "film", "plot", "scene")
NUMBERS = range(60)


def _chat(text: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def _rows(task: str) -> list[dict[str, Any]]:
    texts = [f"{WORDS[n % 5]} {n}" for n in NUMBERS]
    answers = [WORDS[n % 3] for n in NUMBERS]
    row: dict[str, Callable[[int], dict[str, Any]]] = {
        "preference": lambda n: {"prompt": texts[n], "chosen": answers[n], "rejected": "plot"},
        "token-classification": lambda n: {"tokens": ["good", str(n)], "ner_tags": ["B-X", "O"]},
        "text-classification": lambda n: {"review: all": texts[n], "label": answers[n]},
        "multi-label-classification": lambda n: {"text": texts[n], "labels": [answers[n], "any"]},
        "regression": lambda n: {"text": texts[n], "label": n / 7},
        "sft": lambda n: {"messages": _chat(texts[n], answers[n])},
        "embeddings": lambda n: {"anchor": texts[n], "positive": answers[n]},
        "seq2seq": lambda n: {"article": texts[n], "summary": answers[n]},
    }
    return [row[task](n) for n in NUMBERS]


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a configuration and a tokenizer or image processor, without weights."""
    small = {"hidden_size": 16, "intermediate_size": 16}
    sizes = {**small, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}[CLS] {{ m['content'] }} [SEP]{% endfor %}"
        "{% if add_generation_prompt %}[CLS] {% endif %}"
    )
    tokenizer.eos_token = "[SEP]"
    configs = {
        "decoder": transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes),
        "both": transformers.T5Config(
            vocab_size=len(tokenizer), d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8,
            decoder_start_token_id=0,
        ),
        "vision": transformers.ViTConfig(**sizes, image_size=8, patch_size=4),
    }  # fmt: skip
    folders = {"encoder": tiny_model}
    for name, config in configs.items():
        folder = tmp_path_factory.mktemp("models") / name
        config.save_pretrained(folder)
        if name == "vision":
            size = {"height": 8, "width": 8}
            transformers.ViTImageProcessor(size=size).save_pretrained(folder)
        else:
            tokenizer.save_pretrained(folder)
        folders[name] = folder
    return folders


TASKS_OF_TEXT = [
    name
    for name in TASKS.registered
    if {"image", "audio"}.isdisjoint(column.kind for column in TASKS[name].columns)
]
KINDS = {"sft": "decoder", "preference": "decoder", "seq2seq": "both"}
"""Task -> the model that it needs, where that is no encoder."""


@pytest.mark.parametrize("task", TASKS_OF_TEXT)
def test_the_file_is_used_as_it_is(task: str, models: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "my data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in _rows(task)), encoding="utf-8")
    model = models[KINDS.get(task, "encoder")]
    named = {"columns": {"text": "review: all"}} if task == "text-classification" else {}
    check(model, data, task, tmp_path, **named)


def check(model: Path, data: Any, task: str, folder: Path, **named: Any) -> None:
    """Check that init recognizes the task, and that its file means the same again."""
    written = autopeft.init(str(model), data, to=folder / "search.yaml", **named)
    content = yaml.safe_load(written.read_text(encoding="utf-8"))
    assert content["task"] == task
    assert content["space"] == ("preference" if task == "preference" else "default")
    before = autopeft.preview(model=str(model), data=data, **named)
    after = autopeft.preview(written)
    assert after.data.fingerprint == before.data.fingerprint
    assert after.data.columns == before.data.columns


def test_images_in_a_folder(models: dict[str, Path], tmp_path: Path) -> None:
    for number in range(24):
        path = tmp_path / "images" / f"train/{('cat', 'dog')[number % 2]}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number * 9, 0, 0)).save(path)
    check(models["vision"], str(tmp_path / "images"), "image-classification", tmp_path)


def test_several_files_and_a_home_folder(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = tiny_data.read_text(encoding="utf-8").splitlines()
    (tmp_path / "a.csv").write_text("\n".join(lines[:201]), encoding="utf-8")
    with gzip.open(tmp_path / "b.csv.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join([lines[0], *lines[201:]]))
    check(tiny_model, ["~/a.csv", "~/b.csv.gz"], "text-classification", tmp_path)


def test_what_was_asked_for_is_kept(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    asked = {"max_length": 12, "constraints": ["trainable_params<=5k"], "budget": "7trials"}
    written = autopeft.init(str(tiny_model), str(tiny_data), to=tmp_path / "s.yaml", **asked)
    content = yaml.safe_load(written.read_text(encoding="utf-8"))
    assert {name: content[name] for name in asked} == asked


def test_the_file_says_what_was_found(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    text = autopeft.init(str(tiny_model), str(tiny_data), to=tmp_path / "s.yaml").read_text()
    assert "#   3 rows dropped: the text is missing" in text
    assert "#   2 labels: bad, good" in text


def test_lines_of_the_data_stay_comments(tiny_model: Path, tmp_path: Path) -> None:
    labels = ("good\nbudget: 1s", "bad: " + "very " * 60)
    rows = [{"text": f"good {n}", "label": labels[n % 2]} for n in NUMBERS]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = autopeft.init(str(tiny_model), str(path), to=tmp_path / "s.yaml").read_text()
    assert yaml.safe_load(text)["budget"] == "30m"
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert max(map(len, comments)) <= 98


def test_a_file_that_exists_stays(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    target = tmp_path / "search.yaml"
    target.write_text("mine")
    with pytest.raises(StorageError, match="exists"):
        autopeft.init(str(tiny_model), str(tiny_data), to=target)
    assert target.read_text() == "mine"


def test_after_a_mistake_nothing_is_written(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(autopeft.UserError):
        autopeft.init(str(tiny_model), [{"a": "x"}] * 20, to=tmp_path / "search.yaml")
    assert list(tmp_path.iterdir()) == []
