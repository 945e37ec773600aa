from __future__ import annotations

from typing import Any

import pytest
import transformers as hf

from autopeft.serving.older_names import older_names, with_older_names

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({}, {}),
        ({"rope_parameters": None}, {}),
        ({"rope_parameters": {"rope_theta": 5.0}}, {"rope_theta": 5.0}),
        (
            {"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.5}},
            {"rope_theta": 5.0, "partial_rotary_factor": 0.5},
        ),
        (
            {"rope_parameters": {**_YARN, "rope_theta": 5.0}},
            {"rope_theta": 5.0, "rope_scaling": {**_YARN, "type": "yarn"}},
        ),
        (
            {
                "model_type": "gpt_neox",
                "rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.5},
            },
            {"rotary_emb_base": 5.0, "rotary_pct": 0.5},
        ),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {
                    "full_attention": {**_YARN, "rope_theta": 5.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 3.0},
                },
            },
            {
                "rope_theta": 5.0,
                "rope_local_base_freq": 3.0,
                "rope_scaling": {**_YARN, "type": "yarn"},
            },
        ),
        # Another model's types of layers have no older names.
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, {}),
        ({"model_type": "qwen3_moe", "num_local_experts": 4}, {"num_experts": 4}),
        ({"model_type": "gpt2", "n_positions": 64}, {"n_ctx": 64}),
        (
            {"text_config": {"model_type": "qwen3_vl_moe_text", "num_local_experts": 4}},
            {"text_config": {"num_experts": 4}},
        ),
        (
            {
                "model_type": "gemma3n",
                "text_config": {
                    "model_type": "gemma3n_text",
                    "rope_parameters": {
                        "full_attention": {"rope_type": "default", "rope_theta": 5.0},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 3.0},
                    },
                },
            },
            {"text_config": {"rope_theta": 5.0, "rope_local_base_freq": 3.0}},
        ),
        ({"text_config": {"model_type": "mistral"}}, {}),
        ({"text_config": None}, {}),
    ],
)
def test_settings_get_the_names_that_they_had_before_transformers_5(
    config: dict[str, Any], names: dict[str, Any]
) -> None:
    assert older_names(config) == names


def test_older_names_of_a_text_model_are_written_among_its_settings() -> None:
    """Regression: mlx-lm took its own rope_theta for Mistral 3, Gemma 3, Qwen 2 VL and Llama 4."""
    text = {"hidden_size": 8, "rope_parameters": {**_YARN, "rope_theta": 5.0}}
    config = {"model_type": "mistral3", "text_config": text, "vision_config": {"hidden_size": 4}}
    older = {"rope_theta": 5.0, "rope_scaling": {**_YARN, "type": "yarn"}}
    assert with_older_names(config) == {**config, "text_config": {**text, **older}}


def test_transformers_reads_the_same_model_with_the_older_names() -> None:
    rotary = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 123.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 77.0},
    }
    config = hf.Gemma3Config(text_config={"rope_parameters": rotary}).to_dict()
    written = with_older_names(config)
    assert written["text_config"]["rope_theta"] == 123.0
    assert written["text_config"]["rope_local_base_freq"] == 77.0
    read = hf.Gemma3Config(**written).text_config.rope_parameters
    for kind, values in rotary.items():
        assert read[kind] == {**read[kind], **values}
