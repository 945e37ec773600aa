"""Merging into dequantized weights: exact before they are quantized, loaded by transformers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import KINDS, batch_for, candidate_of, disturb, logits_of, save

from autopeft.errors import SettingsError
from autopeft.models.attach import attach
from autopeft.models.backbone import load_backbone
from autopeft.models.export import export_adapter
from autopeft.models.quantization import keep_weights
from autopeft.models.requantize import check_requantizable, dequantize_into
from autopeft.models.saving import load_attached, save_adapter
from autopeft.plan import AdapterPlan, LayerSpec
from autopeft.utils.quiet import quiet_transformers

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="not installed"),
]


def _saved(kind: str, scheme: str, place: Path) -> tuple[str, torch.Tensor, dict[str, Any]]:
    """A base model, an adapter over it in `place/adapter`, its logits and their batch."""
    base = save(kind, place / "base", with_head=kind != "bert")
    backbone = load_backbone(base, auto_class=KINDS[kind].auto_class, quantization=scheme)
    plan = AdapterPlan([LayerSpec(0, "attn.o", "lora", 4), LayerSpec(1, "mlp.down", "ia3")])
    batch = {name: t for name, t in batch_for(backbone).items() if name != "labels"}
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
        logits = logits_of(attached.model, batch)
        save_adapter(attached, place / "adapter")
    return base, logits, batch


@pytest.mark.parametrize(
    ("kind", "scheme"), [("llama", "bnb-8bit"), ("bert", "bnb-4bit"), ("gpt2", "bnb-4bit")]
)
def test_dequantized_weights_stand_for_the_quantized_ones(
    kind: str, scheme: str, tmp_path: Path
) -> None:
    base, logits, batch = _saved(kind, scheme, tmp_path)
    given = load_attached(base, tmp_path / "adapter")
    given.detach()
    whole = load_attached(base, tmp_path / "adapter", quantization="none")
    plain = logits_of(whole.model, batch)
    dequantize_into(given.backbone, whole)
    found = logits_of(whole.model, batch)
    # In 8 bits, what is multiplied is rounded too.
    scale = float(logits.abs().max())
    torch.testing.assert_close(
        found, logits, rtol=0, atol=scale * (1e-5 if "4" in scheme else 0.02)
    )
    assert not torch.allclose(plain, logits, atol=1e-4 * scale)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_requantized_model_is_loaded_by_transformers_alone(dtype: str, tmp_path: Path) -> None:
    base, logits, batch = _saved("llama", "bnb-4bit", tmp_path)
    exported = export_adapter(
        base,
        tmp_path / "adapter",
        tmp_path / "merged",
        format="merged",
        requantize=True,
        rows=batch,
        dtype=dtype,
    )
    assert (exported.quantization, exported.is_lossy) == ("bnb-4bit", True)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert config["use_cache"] is True  # As users have it, not as it was trained.
    with quiet_transformers():
        model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    keep_weights(model)  # bitsandbytes would repack these, whose shape it cannot.
    block = model.model.layers[0]
    assert type(block.self_attn.o_proj).__name__ == "Linear4bit"
    assert {p.dtype for p in model.parameters()} == {torch.uint8, getattr(torch, dtype)}
    found = logits_of(model, batch).float()
    difference = float((found - logits).abs().max())
    assert exported.largest_difference == pytest.approx(difference, rel=0.5)
    assert 0 < difference < 0.1 * float(logits.abs().max())


def test_a_module_without_an_adapter_keeps_its_quantized_weights(tmp_path: Path) -> None:
    base, *_ = _saved("llama", "bnb-4bit", tmp_path)
    options: dict[str, Any] = {"format": "merged", "requantize": True, "dtype": "float32"}
    export_adapter(base, tmp_path / "adapter", tmp_path / "merged", **options)
    with quiet_transformers():
        model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    given = load_attached(base, tmp_path / "adapter")
    given.detach()
    for path, is_same in (("self_attn.q_proj", True), ("self_attn.o_proj", False)):
        before, after = (
            m.model.layers[0].get_submodule(path).weight for m in (given.backbone.model, model)
        )
        assert torch.equal(before, after) == is_same


def test_what_cannot_be_quantized_again_is_refused(tmp_path: Path) -> None:
    base, *_ = _saved("llama", "bnb-4bit", tmp_path)
    with pytest.raises(SettingsError, match="holds no weights of the base model"):
        export_adapter(base, tmp_path / "adapter", tmp_path / "x", format="lora", requantize=True)
    with pytest.raises(SettingsError, match="was not quantized"):
        check_requantizable("none")
    with pytest.raises(SettingsError, match="torchao-int8 has no safetensors files"):
        check_requantizable("torchao-int8")
    assert not (tmp_path / "x").exists()
