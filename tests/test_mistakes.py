"""A user's mistake: one line naming field, value and remedy, status 2, nothing written."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autopeft import cli

pytestmark = [pytest.mark.timeout(240), pytest.mark.filterwarnings("default")]

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Runs `autopeft search` with defaults that would work, changed by what is given."""
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())

    def search(*, may_write: tuple[str, ...] = (), **changed: object) -> tuple[int, str]:
        flags = {
            "model": tiny_model,
            "data": tiny_data,
            "output": tmp_path / "run",
            "budget": "5trials",
            "steps": 9,
            **changed,
        }
        arguments = [
            part
            for name, value in flags.items()
            if value is not None
            for part in (f"--{name.replace('_', '-')}", str(value))
        ]
        monkeypatch.setattr("sys.argv", ["autopeft", "search", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        left = {path.name for path in set(tmp_path.iterdir()) - before} - set(may_write)
        assert not left, f"left behind: {left}"
        status = ended.value.code
        assert isinstance(status, int)
        return status, capsys.readouterr().err

    return search


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def one_class(folder: Path) -> Path:
    return write_rows(folder / "data.csv", [(f"film {n}", "good") for n in range(60)])


def no_rows(folder: Path) -> Path:
    return write_rows(folder / "data.csv", [("", "good"), ("  ", "bad")])


@pytest.mark.parametrize(
    ("changed", "hints"),
    [
        ({"data": "nowhere.csv"}, ("nowhere.csv",)),
        ({"model": "./nowhere"}, ("model", "nowhere")),
        ({"text": "review"}, ("text", "review", "label")),
        ({"label": "stars"}, ("label", "stars", "text")),
        ({"budget": "0trials"}, ("budget", "0trials")),
        # More than any machine does in a second, so that this does not hang on its speed.
        ({"budget": "1s", "steps": 10**9}, ("budget", "1s", "trial")),
        ({"budget": "10flops"}, ("budget", "10flops", "trial")),
        ({"constraint": "trainable_params<=1"}, ("constraint", "trainable_params<=1")),
        ({"constraint": "beauty<=1"}, ("constraint", "beauty")),
        ({"metric": "bleu"}, ("metric", "bleu", "accuracy")),
        ({"pruner": "scissors"}, ("pruner", "scissors")),
        ({"space": "outer"}, ("space", "outer", "default")),
        ({"pick": "worst"}, ("pick", "worst", "one_se")),
        ({"role-map": "attn.x=a"}, ("role_map", "attn.x", "attn.q")),
        ({"storage": "sqlite:////proc/no/study.db"}, ("storage", "/proc/no/study.db")),
        ({"storage": "postgresql://nobody@127.0.0.1:1/none"}, ("storage", "127.0.0.1:1")),
        ({"test": "nowhere.csv"}, ("test", "nowhere.csv")),
    ],
)
def test_settings(run: Run, changed: dict[str, object], hints: tuple[str, ...]) -> None:
    check(*run(**changed), hints)


@pytest.mark.parametrize(
    ("space", "hints"),
    [
        ("methods: [lorra]", ("lorra", "lora")),
        ("methods: [lora]\nroles: [attn.query]", ("attn.query", "attn.q")),
        ("methods: [lora]\nlayers: [0, 7]", ("layers=7", "0 to 1")),
        ("methods: {lora: {ranks: [4096]}}", ("4096", "rank")),
        ("methods: {lora: {ranks: [0]}}", ("0", "rank")),
        ("methods: []", ("methods",)),
        ("metods: [lora]", ("metods", "methods")),
        ("methods: [lora]\ngranularity: word", ("granularity", "word")),
    ],
)
def test_spaces(run: Run, tmp_path: Path, space: str, hints: tuple[str, ...]) -> None:
    (tmp_path / "space.yaml").write_text(space)
    check(*run(space=tmp_path / "space.yaml", may_write=("space.yaml",)), hints)


@pytest.mark.parametrize(
    ("make", "hints"), [(one_class, ("label", "good")), (no_rows, ("data.csv",))]
)
def test_data(
    run: Run, tmp_path: Path, make: Callable[[Path], Path], hints: tuple[str, ...]
) -> None:
    check(*run(data=make(tmp_path), may_write=("data.csv",)), hints)


def test_a_model_that_is_no_transformer(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "resnet"
    folder.mkdir()
    for path in tiny_model.iterdir():
        if path.name.startswith("tokenizer"):
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text('{"model_type": "resnet"}')
    torch.save({}, folder / "pytorch_model.bin")
    check(*run(model=folder, may_write=("resnet",)), ("model", "resnet"))


@pytest.mark.parametrize(
    ("task", "hints"),
    [
        (
            "image-classification",
            ("bert", "AutoModelForImageClassification", "text-classification"),
        ),
        ("seq2seq", ("bert", "AutoModelForSeq2SeqLM")),
        ("sft", ("model", "later tokens", "use a decoder")),
    ],
)
def test_a_model_of_another_task(
    run: Run, tmp_path: Path, task: str, hints: tuple[str, ...]
) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        names = {"sft": ("prompt", "completion"), "seq2seq": ("source", "target")}
        rows = [(f"the film was a plot {n}", "good") for n in range(60)]
        csv.writer(file).writerows([names.get(task, ("image", "label")), *rows])
    check(*run(data=path, task=task, may_write=("rows.csv",)), hints)


def test_the_tasks_named_for_a_model_are_its_own(run: Run, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.csv", [(f"film {n}", "good") for n in range(60)])
    flags = {"task": "seq2seq", "columns": "source=text;target=label"}
    status, error = run(data=data, may_write=("data.csv",), **flags)
    check(status, error, ("text-classification", "regression"))
    assert "sft" not in error


def test_a_folder_that_holds_another_search(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.yaml").write_text("model: x\n")
    check(*run(may_write=("run",)), ("output", "autopeft resume"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["settings.yaml"]


def check(status: int, error: str, hints: tuple[str, ...]) -> None:
    lines = [line for line in error.strip().splitlines() if line.startswith("autopeft:")]
    assert status == 2, error
    assert len(lines) == 1, error
    assert "Traceback" not in error
    for hint in hints:
        assert hint in lines[0], lines[0]
