from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from autopeft.serving.servers import SERVERS, check_export

_ROOT = "base_model.model.model.layers.0.self_attn."
_FOR_LORA = [name for name, server in SERVERS.items() if not server.is_for_models]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A LoRA of rank 4 on queries and values."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for name in ("q_proj", "v_proj"):
        tensors[f"{_ROOT}{name}.lora_A.weight"] = np.zeros((4, 8), np.float32)
        tensors[f"{_ROOT}{name}.lora_B.weight"] = np.zeros((8, 4), np.float32)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


def _configured(folder: Path, **settings: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def _with_tensors(folder: Path, change: Any) -> Path:
    path = folder / "adapter_model.safetensors"
    save_file(dict(change(name, t) for name, t in load_file(path).items()), path)
    return folder


def _broken(folder: Path, server: str) -> list[str]:
    return [line for line in check_export(folder, server) if "is a GGUF file" not in line]


def test_the_folder_itself_keeps_all_rules(folder: Path) -> None:
    for server in ("peft", "vllm", "sglang"):
        assert check_export(folder, server) == []


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"r": None}, "r is None"),
        ({"r": True}, "r is True"),
        ({"r": 4.5}, "r is 4.5"),
        ({"rank_pattern": {"q_proj(": 4}}, "rank_pattern has 'q_proj(': no expression (missing )"),
        ({"rank_pattern": {"q_proj": -4}, "use_rslora": True}, "rank_pattern gives 'q_proj' -4"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern gives 'q_proj' '8'"),
        ({"alpha_pattern": [1]}, "alpha_pattern is [1]"),
    ],
)
def test_numbers_that_are_none_break_a_rule_of_every_server(
    settings: dict[str, Any], named: str, folder: Path
) -> None:
    _configured(folder, **settings)
    for server in _FOR_LORA:
        found = _broken(folder, server)
        assert any(named in line for line in found)
        assert not any("j" in line.split("has ")[-1] and "e-16" in line for line in found)


def test_numbers_of_other_methods_are_their_own(folder: Path) -> None:
    assert _broken(_configured(folder, peft_type="ADALORA", r="any"), "peft") == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda name, t: (name.removeprefix("base_model.model."), t), "does not start with base_"),
        (lambda name, t: (name.replace(".weight", ".default.weight"), t), "more than weight after"),
    ],
)
def test_tensors_that_peft_would_leave_out_are_named(change: Any, named: str, folder: Path) -> None:
    (line,) = _broken(_with_tensors(folder, change), "peft")
    assert named in line


@pytest.mark.parametrize("server", ["peft", "sglang"])
@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["q_proj", "_proj"], "layers.0.self_attn.v_proj is not"),
        (r".*\.q_proj", "layers.0.self_attn.v_proj is not"),
        ("(", "'(' is no expression"),
        (7, "it is 7"),
        ("all-linear", ""),
        (["q_proj", "self_attn.v_proj"], ""),
    ],
)
def test_modules_that_target_modules_does_not_name_are_told(
    targets: Any, named: str, server: str, folder: Path
) -> None:
    found = _broken(_configured(folder, target_modules=targets), server)
    assert bool(found) == bool(named)
    assert not named or any(named in line and "named by target_modules" in line for line in found)


@pytest.mark.parametrize(
    "change",
    [
        lambda name, t: (name, t[:0] if "lora_A" in name else t[:, :0]),
        lambda name, t: (name, t.reshape(-1)),
    ],
)
def test_factors_that_are_no_matrices_break_a_rule(change: Any, folder: Path) -> None:
    _with_tensors(folder, change)
    for server in _FOR_LORA:
        assert any("of one rank; base_model" in line for line in _broken(folder, server))


@pytest.mark.parametrize(
    "name",
    [
        *("peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"),
        *("use_rslora", "use_dora", "bias", "modules_to_save", "init_lora_weights"),
    ],
)
def test_settings_of_another_kind_break_rules_and_nothing_else(name: str, folder: Path) -> None:
    for value in (None, True, -1, 0, 1e400, "", "(", [], [1, None], {}, {"(": "("}):
        _configured(folder, **{name: value})
        assert all("\n" not in line for each in SERVERS for line in check_export(folder, each))
