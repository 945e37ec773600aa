from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import batch_for, build, candidate_of, disturb, logits_of

from autopeft.errors import AdapterError
from autopeft.models.attach import attach
from autopeft.models.saving import load_adapter, save_adapter
from autopeft.plan import AdapterPlan, LayerSpec
from autopeft.utils import expressions
from autopeft.utils.quiet import ignored

_LORA = AdapterPlan([LayerSpec(layer, "attn.q", "lora", 2) for layer in (0, 1)])


def _saved(folder: Path, **changes: Any) -> torch.Tensor:
    """Saves a LoRA on queries as peft does, with a changed configuration; gives its logits."""
    backbone = build("llama")
    with attach(backbone, candidate_of(_LORA), seed=1) as attached:
        disturb(attached, seed=7)
        logits = logits_of(attached.model, batch_for(backbone))
        save_adapter(attached, folder, base_model="tiny")
    (folder / "plan.json").unlink()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return logits


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r".*\.(q_proj)"},
        {"target_modules": r"^(?!.*vision).*\.layers\.\d+\.self_attn\.(?:q_proj|k_proj)$",
         "exclude_modules": r".*\.k_proj"},
        {"r": 64, "lora_alpha": 4, "rank_pattern": {r"layers\.\d+\.self_attn\.q_proj": 2},
         "alpha_pattern": {".*q_proj": 4}},
        {"rank_pattern": {"k_proj": 16}},
        {"lora_alpha": 4, "runtime_config": {"ephemeral_gpu_offload": False}},
    ],
)  # fmt: skip
def test_expressions_and_sizes_that_peft_takes_are_loaded(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    logits = _saved(tmp_path, **changes)
    loaded = load_adapter(build("llama").model, tmp_path)
    torch.testing.assert_close(logits_of(loaded, batch_for(build("llama"))), logits)


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "rank_pattern"])
def test_an_expression_without_an_end_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expressions, "SECONDS", 1.0)
    text = "(.*.*.*.*.*.*.*.*.*a)*b!"
    _saved(tmp_path, **{name: {text: 4} if name == "rank_pattern" else text})
    with pytest.raises(AdapterError, match="takes too long to match") as caught:
        load_adapter(build("llama").model, tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"r": 10**9}, r"has r=1e\+09, and its tensors have at most 2"),
        ({"r": 257}, "has r=257, and"),
        ({"lora_alpha": float("nan")}, "has lora_alpha=nan, which is not finite"),
        ({"rank_pattern": {"k_proj": 10**9}}, r"has rank_pattern=1e\+09, and"),
        ({"peft_type": "HRA", "r": 10**9}, r"has r=1e\+09, and"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**9}, "has num_virtual_tokens=1e"),
        ({"peft_type": "C3A", "block_size": 10**9}, "has block_size=1e"),
    ],
)
def test_a_number_that_cannot_be_is_refused_before_anything_is_made(
    changes: dict[str, Any], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _saved(tmp_path, **changes)
    monkeypatch.setattr("peft.PeftModel.from_pretrained", None)
    with pytest.raises(AdapterError, match=problem) as caught:
        load_adapter(build("llama").model, tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_the_rank_of_factors_of_an_embedding_is_known(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=300, target_modules=["embed_tokens"])
    with ignored(FutureWarning), ignored(UserWarning):
        peft.get_peft_model(build("llama").model, config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    assert 300 in {tensor.shape[0] for tensor in tensors.values()}
    save_file(tensors, file)
    load_adapter(build("llama").model, tmp_path)
