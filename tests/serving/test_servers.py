from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from tiny_models import build

from autopeft.errors import AdapterError, SettingsError
from autopeft.serving.servers import SERVERS, check_export

# peft asks transformers for an attribute by its old name, and for a config that is only in memory.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]


def _plain_peft(folder: Path, config: Any = None, **settings: Any) -> Path:
    """A folder that peft alone writes."""
    given = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8, **settings}
    model = get_peft_model(build("llama").model, config or LoraConfig(**given))
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("server", ["peft", "vllm", "sglang"])
def test_a_plain_lora_of_one_rank_keeps_all_rules(server: str, tmp_path: Path) -> None:
    assert check_export(_plain_peft(tmp_path), server) == []


_RANKS = {"rank_pattern": {"v_proj": 8}, "alpha_pattern": {"v_proj": 16}}


@pytest.mark.parametrize(
    ("settings", "broken"),
    [
        (_RANKS, {"vllm": "rank above r", "sglang": "has rank r", "llamacpp": "its own rank"}),
        # Alpha is the same everywhere: llama.cpp divides it by the tensor's own rank, as peft does.
        ({"rank_pattern": {"v_proj": 2}}, {"vllm": "one scaling", "sglang": "has rank r"}),
        ({"use_rslora": True}, {"sglang": "lora_alpha / r", "llamacpp": "its own rank"}),
        ({"use_dora": True}, {"vllm": "no DoRA", "sglang": "no DoRA", "llamacpp": "no DoRA"}),
        (
            {"modules_to_save": ["lm_head"]},
            {"vllm": "modules_to_save", "sglang": "only lora_A", "llamacpp": "only lora_A"},
        ),
        ({"bias": "all"}, {"vllm": "trains no bias"}),
        ({"r": 600}, {"vllm": "r is at most 512"}),
    ],
)
def test_each_server_names_what_it_would_refuse_or_scale_wrongly(
    settings: dict[str, Any], broken: dict[str, str], tmp_path: Path
) -> None:
    folder = _plain_peft(tmp_path, **settings)
    assert check_export(folder, "peft") == []
    for server in ("vllm", "sglang", "llamacpp"):
        found = [line for line in check_export(folder, server) if "is a GGUF file" not in line]
        assert bool(found) == (server in broken)
        assert not found or any(broken[server] in line for line in found)
        assert all(line.startswith(f"{server}: must hold: ") for line in found)


def test_another_method_is_for_peft_alone(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    folder = _plain_peft(tmp_path, config)
    assert check_export(folder, "peft") == []
    assert any("peft_type is IA3" in line for line in check_export(folder, "vllm"))


def test_a_tensor_of_another_rank_than_the_configuration_says_is_found(tmp_path: Path) -> None:
    folder = _plain_peft(tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 2}))
    (line,) = check_export(folder, "peft")
    assert "has 4, not 2" in line


def test_a_folder_of_something_else_breaks_every_servers_rules(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "adapter_model.bin")
    for name in SERVERS:
        assert check_export(tmp_path, name)


def test_what_cannot_be_checked_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such server; use one of peft, vllm"):
        check_export(tmp_path, "triton")
    with pytest.raises(AdapterError, match="no such folder"):
        check_export(tmp_path / "none", "vllm")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        check_export(tmp_path, "vllm")
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"none")
    with pytest.raises(AdapterError, match="not a safetensors file"):
        check_export(tmp_path, "vllm")
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter.gguf").write_bytes(b"none")
    with pytest.raises(AdapterError, match="not a GGUF file"):
        check_export(tmp_path, "ollama")
