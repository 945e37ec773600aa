from __future__ import annotations

import pytest
import transformers as hf

from autopeft.profiling.packing import keeps_rows_apart

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "is_apart"),
    [
        (hf.LlamaConfig(**_SIZES, intermediate_size=64), True),
        (hf.GPT2Config(n_embd=32, n_head=4), True),
        (hf.GPTNeoXConfig(**_SIZES, intermediate_size=64), True),
        (hf.BloomConfig(hidden_size=32, n_head=4), False),
        (hf.MptConfig(d_model=32, n_heads=4), False),
        (hf.MambaConfig(hidden_size=32, state_size=4), False),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_models_that_keep_packed_rows_apart(config: hf.PretrainedConfig, is_apart: bool) -> None:
    assert keeps_rows_apart(config, "AutoModelForCausalLM") is is_apart
