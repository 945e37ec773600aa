"""A member as an experiment of peft's suite, which becomes a row of a prior again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
from click.testing import CliRunner
from searches import SHORT

import autopeft
from autopeft import cli
from autopeft.comparing.experiment import export_experiment
from autopeft.comparing.prior_file import add_to_prior
from autopeft.errors import UserError
from autopeft.searcher.samplers.prior import read_prior

pytestmark = pytest.mark.filterwarnings("default")


def test_a_member_goes_to_the_suite_and_back(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    folder, to = tmp_path / "run", tmp_path / "experiment"
    space = {"methods": {"lora": {"ranks": [2]}}, "placements": {"qv": ["attn.q", "attn.v"]}}
    settings = {**SHORT, "model": str(tiny_model), "data": str(tiny_data), "output": str(folder)}
    result = autopeft.search(
        settings, space={**space, "granularity": "model"}, compress=False, progress=False
    )
    member = result.best
    words = ["export", str(folder), "--format", "hf-comparison", "--to", str(to)]
    done = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "not measured, so null: total_time, peft_branch, " in " ".join(done.output.split())
    (config,) = to.rglob("adapter_config.json")
    assert config.parent.parent == to / "experiments" / "lora"
    assert peft.PeftConfig.from_pretrained(str(config.parent)).r == 2
    parameters = json.loads((config.parent / "training_params.json").read_text())
    assert parameters["max_steps"] == SHORT["steps"]
    assert parameters["optimizer_kwargs"]["lr"] == member.candidate.train.learning_rate
    (path,) = (to / "results").iterdir()
    row = json.loads(path.read_text())
    assert parameters["max_seq_length"] == result.view.data.max_length > 0
    for part in ("run_info", "train_info"):
        nulls = [name for name, value in _items(row[part]) if value is None]
        assert nulls
        assert all(name in done.output for name in nulls)
    assert row["train_info"]["num_trainable_params"] == member.entry.price.trainable_params
    assert row["train_info"]["accelerator_memory_max"] is None
    assert row["train_info"]["metrics"][-1]["test accuracy"] == member.objectives["accuracy"]
    with pytest.raises(UserError, match="leave --for and --push-to out"):
        autopeft.export(folder, format="hf-comparison", server="vllm", to=tmp_path / "other")
    assert row["run_info"]["peft_config"]["target_modules"] == ["query", "value"]
    add_to_prior([to], tmp_path / "prior.json")
    (known,) = read_prior(tmp_path / "prior.json")
    assert (known.method, known.rank, known.roles) == ("lora", 2, ("attn.q", "attn.v"))
    assert known.quality == member.objectives["accuracy"]
    _forgetting_is_told_and_not_taken_for_the_suites(result, tmp_path / "forgot")
    (member.folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="no single configuration of peft holds"):
        autopeft.export(folder, format="hf-comparison", to=tmp_path / "other")


def _forgetting_is_told_and_not_taken_for_the_suites(
    result: autopeft.SearchResult, to: Path
) -> None:
    view, member = result.view, result.best
    view = replace(view, settings={**view.settings, "retain": "kept.txt"})
    seeds = tuple(replace(line, further={"forgetting": 0.02}) for line in member.entry.seeds)
    member = replace(member, entry=replace(member.entry, seeds=seeds))
    made = export_experiment(replace(result, view=view), member, to)
    assert "; that of kept.txt is +0.0200" in " ".join(made.lines)
    (path,) = (to / "results").iterdir()
    assert json.loads(path.read_text())["train_info"]["metrics"][-1]["forgetting"] is None


def _items(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of a result, but for those of peft's own configuration."""
    for name, value in row.items():
        inner = value[-1] if name == "metrics" else value
        if name == "peft_config":
            continue
        if isinstance(inner, dict):
            yield from _items(inner)
        else:
            yield name, value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("score", True),
        ("requantize", True),
        ("allow_lossy", True),
        ("max_rank", 8),
        ("max_shard_size", "5GB"),
        ("dtype", "bfloat16"),
        ("device", "cpu"),
    ],
)
def test_what_an_experiment_has_not_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    asked: dict[str, Any] = {name: value}
    named = f"^{name}={value!r}: format=hf-comparison holds .* leave it out"
    with pytest.raises(UserError, match=named):
        autopeft.export(tmp_path, format="hf-comparison", to=tmp_path / "other", **asked)


def test_the_formats_named_for_an_unknown_one_are_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"use one of peft, lora, merged, gguf, hf-comparison$"):
        autopeft.export(tmp_path, format="foo", to=tmp_path / "other")
