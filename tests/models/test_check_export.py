from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import build, save

from autopeft import cli
from autopeft.models.check_export import check_export, examine

# peft asks transformers for an attribute by its old name, and for a config that is only in memory.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

_Tensors = dict[str, torch.Tensor]
_COMPLETE, _PLACED, _TARGETED = "has its tensors", "module of the base", "configuration targets;"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on queries and values of a tiny Llama that is here."""
    folder = tmp_path_factory.mktemp("plain")
    base = save("llama", folder / "base", with_head=True)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=8)
    model: Any = get_peft_model(build("llama").model, config)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


def _with(
    plain: Path, to: Path, change: Callable[[_Tensors], _Tensors] = dict, **settings: Any
) -> Path:
    shutil.copytree(plain, to, dirs_exist_ok=True)
    config, weights = to / "adapter_config.json", to / "adapter_model.safetensors"
    row = {**json.loads(config.read_text()), **settings}
    config.write_text(json.dumps({name: value for name, value in row.items() if value != "none"}))
    save_file(change(load_file(weights)), weights)
    return to


@pytest.mark.parametrize("server", ["peft", "vllm", "sglang"])
def test_a_whole_adapter_keeps_all_rules_and_all_are_applied(server: str, plain: Path) -> None:
    found = examine(plain, server)
    assert found.broken == found.notes == ()


@pytest.mark.parametrize(
    ("old", "new", "refusing"),
    [
        ("layers.1.", "layers.9.", ("peft", "vllm", "sglang")),
        ("v_proj", "w_proj", ("peft", "vllm", "sglang")),
        # vLLM takes the prefix away wherever it is.
        ("base_model.model.", "base_model.model.base_model.model.", ("peft", "sglang")),
    ],
)
def test_tensors_in_the_wrong_place_break_rules(
    old: str, new: str, refusing: tuple[str, ...], plain: Path, tmp_path: Path
) -> None:
    folder = _with(plain, tmp_path, lambda held: {n.replace(old, new): t for n, t in held.items()})
    for server in ("peft", "vllm", "sglang"):
        found = check_export(folder, server)
        for words in (_COMPLETE, _TARGETED if server == "peft" else _PLACED):
            assert any(words in line for line in found) == (server in refusing)


@pytest.mark.parametrize("part", ["layers.1.", "v_proj"])
@pytest.mark.parametrize("server", ["peft", "vllm", "sglang"])
def test_half_an_adapter_breaks_a_rule(server: str, part: str, plain: Path, tmp_path: Path) -> None:
    folder = _with(plain, tmp_path, lambda held: {n: t for n, t in held.items() if part not in n})
    assert any(_COMPLETE in line for line in check_export(folder, server))


@pytest.mark.parametrize("server", ["peft", "vllm", "sglang"])
def test_widths_of_another_model_break_a_rule(server: str, plain: Path, tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    folder = _with(plain, tmp_path, lambda held: held | {name: torch.zeros(4, 7)})
    (line,) = check_export(folder, server)
    assert f"the shapes that the base model needs; {name} is [4, 7], not [4, 32]" in line


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"layers_to_transform": [0]}, "layers_to_transform leaves out model.layers.1."),
        ({"exclude_modules": ["v_proj"]}, "exclude_modules leaves out model.layers.0.self_attn.v"),
        ({"exclude_modules": r".*v_proj"}, "exclude_modules leaves out"),
        ({"target_modules": []}, "named by target_modules; model.layers.0.self_attn.q_proj is not"),
        ({"peft_type": "FOO"}, "peft_type is 'FOO'"),
        ({"peft_type": "lora"}, "peft_type is 'lora'"),
        ({"peft_type": "none"}, "peft_type is None"),
    ],
)
def test_what_peft_would_not_load_is_named(
    settings: dict[str, Any], named: str, plain: Path, tmp_path: Path
) -> None:
    folder = _with(plain, tmp_path, **settings)
    assert any(named in line for line in check_export(folder, "peft"))
    if "layers_to_transform" in settings or "exclude_modules" in settings:
        # vLLM finds modules by the tensors alone.
        assert check_export(folder, "vllm") == []


def test_what_was_not_checked_is_told(plain: Path, tmp_path: Path) -> None:
    folder = _with(plain, tmp_path, base_model_name_or_path="/none", lora_alpha="none")
    done = CliRunner().invoke(cli.app, ["check-export", str(folder), "--for", "peft"])
    assert done.exit_code == 0
    _, base, alpha = done.output.splitlines()
    assert base.startswith("not checked: ")
    assert base.endswith("/none is not on this machine")
    assert alpha.endswith("lora_alpha is not named: PEFT takes 8")
    folder = _with(plain, tmp_path, base_model_name_or_path="none")
    assert examine(folder, "peft").notes[0].endswith("none is named")


def test_a_whole_model_has_no_modules_to_compare(plain: Path) -> None:
    assert examine(plain.parent / "base", "transformers").notes == ()
