from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from autopeft.serving.targeting import left_out

_PATHS = [
    *(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1, 11)),
    "model.layers.1.mlp.experts.0.up_proj",
    "encoder.h.1.attn.q_proj",
    "q_proj",
    "lm_head",
]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"exclude_modules": ["layers.1.self_attn.q_proj", "lm_head"]},
        {"exclude_modules": "q_proj"},
        {"exclude_modules": r".*1.*"},
        {"layers_to_transform": 1},
        {"layers_to_transform": [0, 11]},
        {"layers_to_transform": [1], "layers_pattern": "h"},
        {"layers_to_transform": [1], "layers_pattern": ["x", "layers"]},
        {"layers_to_transform": []},
    ],
)
def test_modules_are_left_out_as_peft_leaves_them_out(settings: dict[str, Any]) -> None:
    targets = ["q_proj", "up_proj", "lm_head"]
    config = LoraConfig(target_modules=targets, **settings)
    row = {"target_modules": targets, **settings}
    for path in _PATHS:
        found = check_target_module_exists(config, path)
        assert bool(left_out(row, path)) == (not isinstance(found, bool) or not found)
