"""A decoder's classifier needs the padding token, which GPT-2 and Llama do not name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import candidate_of, disturb
from tokenizers import Tokenizer, models, pre_tokenizers

from autopeft.models.attach import attach
from autopeft.models.backbone import Backbone, load_backbone
from autopeft.models.export import export_adapter
from autopeft.models.saving import load_adapter, save_adapter
from autopeft.plan import AdapterPlan, LayerSpec

CLASS = "AutoModelForSequenceClassification"
END = 3
KWARGS = {"num_labels": 3, "pad_token_id": END}
ROWS = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [9, 4, END, END]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
}
CONFIGS: dict[str, Any] = {
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16, eos_token_id=END
    ),
    "llama": lambda: hf.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=END,
    ),
}
ROLE = {"gpt2": "attn.qkv", "llama": "attn.q"}


@pytest.fixture(params=sorted(CONFIGS))
def base(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    torch.manual_seed(0)
    folder = str(tmp_path / "base")
    hf.AutoModel.from_config(CONFIGS[request.param]()).save_pretrained(folder)
    words = ["<unk>", *(f"w{i}" for i in range(2)), "<end>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder)
    return request.param, folder


def _saved(name: str, backbone: Backbone, folder: Path) -> torch.Tensor:
    plan = AdapterPlan([LayerSpec(1, ROLE[name], "lora", 2)])
    with attach(backbone, candidate_of(plan), seed=0) as attached:
        disturb(attached)
        save_adapter(attached, folder)
        return _logits(attached.model)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**ROWS).logits
    return logits


def test_two_rows_after_every_load_and_export(base: tuple[str, str], tmp_path: Path) -> None:
    name, folder = base
    backbone = load_backbone(folder, auto_class=CLASS, model_kwargs=KWARGS)
    saved = tmp_path / "saved"
    own = _saved(name, backbone, saved)
    assert own.shape == (2, 3)
    torch.testing.assert_close(_logits(load_adapter(folder, saved)), own, rtol=0.0, atol=0.0)
    # A model object that knows nothing of padding.
    plain = hf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert plain.config.pad_token_id is None
    torch.testing.assert_close(_logits(load_adapter(plain.eval(), saved)), own, rtol=0.0, atol=0.0)
    for kind in ("peft", "lora", "merged"):
        export_adapter(folder, saved, tmp_path / kind, format=kind, rows=ROWS)
    torch.testing.assert_close(
        _logits(load_adapter(folder, tmp_path / "peft")), own, rtol=0.0, atol=0.0
    )
    # No plan.json: three outputs and the padding token are found in files and tokenizer.
    lora = _logits(load_adapter(folder, tmp_path / "lora"))
    torch.testing.assert_close(lora, own, rtol=1e-4, atol=1e-5)
    merged = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.pad_token_id == END
    torch.testing.assert_close(_logits(merged), own, rtol=1e-4, atol=1e-5)
