from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import batch_for, build

from autopeft.errors import SettingsError
from autopeft.models.attention import attention_in, check_attention, use_attention
from autopeft.settings import SearchSettings


def test_an_implementation_changes_no_result() -> None:
    backbone = build("llama")
    model: Any = backbone.model
    batch = batch_for(backbone)
    found = []
    for name in ("auto", "eager", "sdpa"):
        check_attention(name, model, "cpu", "fp32")
        use_attention(name, model)
        found.append(model(**batch).loss)
        assert model.config._attn_implementation == (name if name != "auto" else "sdpa")
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


@pytest.mark.parametrize(
    ("name", "device", "precision", "problem"),
    [
        ("flash_attention_2", "cpu", "auto", "does not run on cpu; use sdpa"),
        ("flash_attention_3", "cuda", "fp32", "computes in 16 bits only"),
    ],
)
def test_what_cannot_be_used_is_refused(
    name: str, device: str, precision: str, problem: str
) -> None:
    with pytest.raises(SettingsError, match=problem):
        check_attention(name, build("llama").model, device, precision)


def test_a_model_without_an_implementation_is_refused() -> None:
    config = hf.BloomConfig(vocab_size=9, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(SettingsError, match="BloomForCausalLM does not have it; leave it out"):
        check_attention("sdpa", hf.BloomForCausalLM(config), "cpu", "fp32")
    check_attention("eager", hf.BloomForCausalLM(config), "cpu", "fp32")


def test_flash_attention_gives_way_where_scores_are_in_fp32() -> None:
    model: Any = build("llama").model
    used: list[str] = []
    model.config._attn_implementation = "flash_attention_2"
    model.set_attn_implementation = used.append
    with attention_in("bf16", model):
        assert used == []
    with attention_in("fp32", model):
        assert used == ["sdpa"]
    assert used == ["sdpa", "flash_attention_2"]


def test_names_are_those_of_transformers() -> None:
    settings = SearchSettings(model="m", data="d")
    assert settings.attn_implementation == "auto"
    with pytest.raises(SettingsError, match="use one of auto, eager, sdpa"):
        replace(settings, attn_implementation="flash")
