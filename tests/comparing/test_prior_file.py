"""Result files of peft's suite as rows of a prior: what is read, what is left out, mistakes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autopeft import cli
from autopeft.comparing.prior_file import add_to_prior
from autopeft.costs import Topology
from autopeft.errors import UserError
from autopeft.searcher.samplers.prior import point_of, read_prior
from autopeft.searcher.space.space import SearchSpace

_LORA = {
    "task_type": "CAUSAL_LM",
    "peft_type": "LORA",
    "base_model_name_or_path": "org/Tiny",
    "inference_mode": False,
    "r": 8,
    "target_modules": ["v_proj", "q_proj"],
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "init_lora_weights": True,
    "rank_pattern": {},
    "use_dora": False,
    "an_argument_of_another_peft": 3,
}


def _result(folder: Path, name: str, **change: Any) -> Path:
    """A result in the suite's form; `change` replaces parts of it."""
    config = change.get("config", _LORA)
    row = {
        "run_info": {
            "experiment_name": name,
            "train_config": {
                "model_id": "org/Tiny",
                "seed": 0,
                "optimizer_type": change.get("optimizer", "AdamW"),
                "optimizer_kwargs": change.get("rate", {"lr": 1e-3, "weight_decay": 0.1}),
            },
            "peft_config": config if config is None else {**config, **change.get("more", {})},
        },
        "train_info": {
            "status": change.get("status", "success"),
            "metrics": [
                {"step": 250, "valid accuracy": 0.4},
                {"step": 500, **change.get("test", {"test accuracy": 0.48})},
            ],
        },
        "meta_info": {"dataset_info": {"metamath": {}, "gsm8k": {}}},
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(row), encoding="utf-8")
    return path


def test_results_become_rows_by_method_rank_and_placement(tmp_path: Path) -> None:
    folder, to = tmp_path / "results", tmp_path / "prior.json"
    folder.mkdir()
    _result(folder, "lora")
    _result(folder, "dora", more={"use_dora": True, "target_modules": ["down_proj"]})
    _result(folder, "gaussian", more={"init_lora_weights": "gaussian", "r": 4})
    _result(folder, "all", more={"target_modules": "all-linear"}, rate={})
    ia3 = {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []}
    _result(folder, "ia3", config=ia3, status="failed")
    (folder / "notes.json").write_text("{}", encoding="utf-8")
    added = add_to_prior([folder], to)
    assert (added.n_new, added.n_known, added.n_without_rate) == (5, 0, 1)
    rows = {(row.method, row.rank, len(row.roles)): row for row in read_prior(to)}
    lora = rows["lora", 8, 2]
    assert lora.roles == ("attn.q", "attn.v")
    assert lora.setting == "org/Tiny on gsm8k+metamath"
    assert (lora.quality, lora.learning_rate) == (0.48, 1e-3)
    assert rows["dora", 8, 1].roles == ("mlp.down",)
    assert rows["lora", 4, 2].quality == 0.48
    assert rows["lora", 8, 7].learning_rate is None
    assert rows["ia3", 0, 1].quality is None
    space = SearchSpace.from_source(
        {"methods": ["lora", "ia3"], "placements": {"qv": ["attn.q", "attn.v"]}},
        Topology(2, {"attn.q": (64, 64), "attn.v": (64, 64)}),
    )
    assert point_of(lora, space) is not None


def test_rows_are_added_once(tmp_path: Path) -> None:
    to = tmp_path / "prior.json"
    first = _result(tmp_path, "lora")
    add_to_prior([first], to)
    second = _result(tmp_path, "other", test={"test accuracy": 0.5})
    done = CliRunner().invoke(
        cli.app, ["prior", "add", str(first), str(second), "--to", str(to)], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "1 row added, 1 were known" in done.output
    assert [row.quality for row in read_prior(to)] == [0.48, 0.5]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"config": None}, "full fine-tuning"),
        ({"status": "canceled"}, "its status is canceled"),
        ({"optimizer": "lora+"}, "trained with lora+"),
        ({"config": {"peft_type": "PROMPT_TUNING"}}, "is no method of autopeft"),
        ({"config": {"peft_type": "FUTURE"}}, "peft cannot read its configuration of FUTURE"),
        ({"more": {"lora_bias": True}}, "as it is set up is no method"),
        ({"more": {"rank_pattern": {"q_proj": 4}}}, "unlike ranks"),
        ({"more": {"layers_to_transform": [0]}}, "some blocks of a number that is unknown"),
        ({"more": {"exclude_modules": ["layers.1"]}}, "leaves out some of the modules"),
        ({"config": {"peft_type": "OFT", "r": 8, "oft_block_size": 0}}, "is no method of autopeft"),
        ({"more": {"target_modules": ["layers.0.q_proj"]}}, "named block by block"),
        ({"more": {"target_modules": ["c_proj"]}}, "known for several roles"),
        ({"more": {"target_modules": ".*q_proj"}}, "not listed by name"),
        ({"test": {}}, "it has no test accuracy"),
    ],
)
def test_what_is_no_row_is_counted_and_told(
    change: dict[str, Any], why: str, tmp_path: Path
) -> None:
    files = [_result(tmp_path, "good"), _result(tmp_path, "odd", **change)]
    added = add_to_prior(files, tmp_path / "prior.json")
    assert added.n_new == 1
    (reason,) = added.left_out
    assert why in reason
    assert any(line == f"1 file left out: {reason}" for line in added.lines())
    with pytest.raises(UserError, match="no result gives a row of a prior"):
        add_to_prior(files[1:], tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize(
    ("change", "mistake"),
    [
        ({"more": {"r": "8"}}, "peft_config.r='8': must be a whole number"),
        ({"more": {"r": 8.5}}, "peft_config.r=8.5: must be a whole number"),
        ({"more": {"r": 0}}, "peft_config.r=0: `r >= 1` must hold"),
        ({"more": {"r": -4}}, "peft_config.r=-4: `r >= 1` must hold"),
        ({"more": {"lora_dropout": "none"}}, "peft_config.lora_dropout='none': must be a number"),
        ({"more": {"target_modules": [1, 2]}}, "peft_config.target_modules[0]=1: must be text"),
        ({"more": {"target_modules": {"q_proj": 1}}}, "peft_config.target_modules="),
        ({"rate": {"lr": "1e-4"}}, "optimizer_kwargs.lr='1e-4': must be a number"),
        ({"rate": {"lr": True}}, "optimizer_kwargs.lr=True: must be a number"),
        ({"rate": {"lr": math.inf}}, "optimizer_kwargs.lr=inf: must be finite and above 0"),
        ({"rate": {"lr": -1e-4}}, "optimizer_kwargs.lr=-0.0001: must be finite and above 0"),
        ({"test": {"test accuracy": "0.5"}}, "test accuracy='0.5': must be a number"),
        ({"test": {"test accuracy": True}}, "test accuracy=True: must be a number"),
        ({"test": {"test accuracy": math.nan}}, "test accuracy=nan: must be a share of rows"),
        ({"test": {"test accuracy": 62.5}}, "test accuracy=62.5: must be a share of rows"),
        ({"test": {"test accuracy": -3}}, "test accuracy=-3.0: must be a share of rows"),
    ],
)
def test_an_impossible_value_is_named_with_its_file(
    change: dict[str, Any], mistake: str, tmp_path: Path
) -> None:
    files = [_result(tmp_path, "good"), _result(tmp_path, "odd", **change)]
    with pytest.raises(UserError, match=re.escape(mistake)) as caught:
        add_to_prior(files, tmp_path / "prior.json")
    assert "odd.json" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "prior.json").exists()


def test_a_cut_off_file_among_the_results_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    whole = _result(folder, "lora").read_text(encoding="utf-8")
    (folder / "odd.json").write_text(whole[:100], encoding="utf-8")
    with pytest.raises(UserError, match=r"odd\.json': is not JSON"):
        add_to_prior([folder], tmp_path / "prior.json")


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    to = tmp_path / "prior.json"
    with pytest.raises(UserError, match="no such file or folder"):
        add_to_prior([tmp_path / "nowhere"], to)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no result file"):
        add_to_prior([tmp_path / "empty"], to)
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"run_info": 3, "train_info": {}}', encoding="utf-8")
    with pytest.raises(UserError, match=r"damaged\.json.*run_info"):
        add_to_prior([damaged], to)
    to.write_text("[3]", encoding="utf-8")
    with pytest.raises(UserError, match="prior"):
        add_to_prior([_result(tmp_path, "lora")], to)
