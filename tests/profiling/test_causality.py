from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    Qwen3Config,
    RobertaConfig,
)

from autopeft.profiling.causality import sees_later_tokens

SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "vocab_size": 90,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, num_key_value_heads=2),
        Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
        Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8),
        GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=90),
        BertConfig(**SMALL, is_decoder=True),
    ],
    ids=lambda config: str(type(config).__name__),
)
def test_decoders_do_not(config: Any) -> None:
    assert sees_later_tokens(config, "AutoModelForCausalLM") is False


@pytest.mark.parametrize(
    "config",
    [BertConfig(**SMALL), RobertaConfig(**SMALL)],
    ids=lambda config: str(type(config).__name__),
)
def test_encoders_do(config: Any) -> None:
    assert sees_later_tokens(config, "AutoModelForCausalLM") is True


def test_a_model_that_cannot_be_built_is_unknown() -> None:
    assert sees_later_tokens(ModernBertConfig(**SMALL), "AutoModelForCausalLM") is None
