"""Advice as a user gets it: for several tasks, as a command, and after mistakes."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from task_rows import DATA

import autopeft
from autopeft import cli
from autopeft.advice import advise as room
from autopeft.advice.scores import SCORES
from autopeft.errors import UserError


def _run(command: str, *words: str) -> str:
    done = CliRunner().invoke(cli.app, [command, *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command_ranks_sites_and_says_what_to_run_next(
    tiny_model: Path, tiny_data: Path
) -> None:
    text = _run("advise", str(tiny_model), str(tiny_data), "--rows", "500", "--batch-size", "8")
    assert "training rows scored; 500 were asked for, there are no more" in text
    for name, score in SCORES.items():
        assert f" {name} " in text
        assert score.source.split()[-1:] == [] or score.source.split()[-1] in text
    assert "start with lora r8 @" in text
    _, _, command = text.partition("next: autopeft search ")
    words = shlex.split(command)
    assert words[words.index("--batch-size") + 1] == "8"
    # The same flags, without training.
    priced = _run("price", *words[: words.index("--output")])
    assert "space custom" in priced


@pytest.mark.parametrize("task", ["token-classification", "preference", "sft"])
def test_any_task_gives_a_loss_to_judge_by(task: str, tiny_model: Path, tiny_llama: Path) -> None:
    model = tiny_model if task == "token-classification" else tiny_llama
    advice = autopeft.advise(str(model), DATA[task][0], rows=12, task=task)
    roles = 6 if model is tiny_model else 7
    assert len(advice.sites) == 2 * roles
    assert advice.command == "", "a temporary folder's name is of no use"
    assert len({spec.layer for spec in advice.plan.specs}) == 1
    assert advice.price.trainable_params > 0
    assert advice.space["layers"] == sorted({spec.layer for spec in advice.plan.specs})
    frame = advice.to_pandas()
    assert set(frame.columns) == {"layer", "role", "in_plan", *SCORES}
    assert frame["in_plan"].sum() == len(advice.plan.specs)
    assert "start with lora" in advice._repr_html_()
    assert "pre-wrap" in advice._repr_html_()  # The command is longer than a notebook is wide.
    assert repr(advice).startswith("<Advice by ")


def test_a_score_that_tells_more_than_depth_ranks_sites_and_roles(
    tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "best_score", lambda found: "PAGE")
    advice = autopeft.advise(str(tiny_model), str(tiny_data), rows=16)
    values = [site.scores["PAGE"] for site in advice.sites]
    assert values in (sorted(values), sorted(values, reverse=True))
    assert advice.why.startswith("ranked by PAGE, ")
    assert len(advice.plan.specs) == 3
    assert set(advice.space["placements"]["advised"]) == {spec.role for spec in advice.plan.specs}


def test_where_no_score_is_sure_the_advice_is_depth(
    tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "best_score", lambda found: "depth")
    advice = autopeft.advise(str(tiny_model), str(tiny_data), rows=16)
    assert "no score told more than depth" in advice.why
    assert len({spec.layer for spec in advice.plan.specs}) == 1
    assert len(advice.plan.specs) == 6, "depth tells nothing of roles"


def test_the_users_space_bounds_the_advice(tiny_model: Path, tiny_data: Path) -> None:
    space = {
        "methods": {"lora": {"ranks": [2, 4], "learning_rate": [1e-3, 2e-3]}, "ia3": None},
        "layers": [1],
        "placements": {"mlp": ["mlp.up", "mlp.down"]},
        "alpha_ratio": [1.0],
    }
    advice = autopeft.advise(str(tiny_model), str(tiny_data), rows=16, space=space)
    assert {(site.layer, site.role) for site in advice.sites} == {(1, "mlp.up"), (1, "mlp.down")}
    assert {spec.rank for spec in advice.plan.specs} == {4}
    assert len(advice.plan.specs) == 1 + (advice.score == "depth")
    assert advice.learning_rates == (1e-3, 2e-3)
    assert advice.space["methods"]["lora"] == {"ranks": [2, 4], "learning_rate": [1e-3, 2e-3]}
    assert advice.space["alpha_ratio"] == [1.0]


def test_that_a_space_without_lora_gets_one_is_said(tiny_model: Path, tiny_data: Path) -> None:
    space = {"methods": ["ia3"]}
    advice = autopeft.advise(str(tiny_model), str(tiny_data), rows=4, space=space)
    assert advice.space["methods"] == ["ia3", "lora"]
    assert any("the space has no lora" in line for line in advice.lines)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rows": 0}, "rows=0: `rows >= 1` must hold"),
        ({"label": "sentiment"}, "sentiment"),
        ({"quantization": "bnb-4bit"}, "the scores need the weights in full precision"),
        ({"space": {"methods": ["ln_tuning"]}}, "adapts no linear module"),
        ({"evaluate": "os:getcwd"}, "no loss to take gradients of"),
    ],
)
def test_a_mistake_is_one_line(
    more: dict[str, Any], message: str, tiny_model: Path, tiny_data: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        autopeft.advise(str(tiny_model), str(tiny_data), **more)
    assert "\n" not in str(caught.value)


def test_data_without_rows_and_a_model_without_blocks_are_refused(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.csv"
    empty.write_text("text,label\n")
    with pytest.raises(UserError, match="empty"):
        autopeft.advise(str(tiny_model), str(empty))
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(UserError, match="model"):
        autopeft.advise(str(tmp_path / "model"), str(tiny_data))


def test_a_head_that_hides_the_blocks_is_told(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    torch.nn.init.zeros_(model.classifier.weight)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, tmp_path)
    with pytest.raises(UserError, match="no gradient reaches any linear module"):
        autopeft.advise(str(tmp_path), str(tiny_data), rows=16)
