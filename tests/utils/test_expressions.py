from __future__ import annotations

import time
from typing import Any

import pytest

from autopeft.utils import expressions
from autopeft.utils.expressions import endless

_NAMES = [f"bert.encoder.layer.{i}.attention.self.{n}" for i in range(40) for n in ("query", "key")]
_ENDLESS = "(.*.*.*.*.*.*.*.*.*a)*b!"


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": _ENDLESS},
        {"exclude_modules": _ENDLESS},
        {"rank_pattern": {"query": 2, _ENDLESS: 4}},
        {"modules_to_save": ["classifier", _ENDLESS]},
        {"layers_pattern": "(a|a|[a-z.]+)+!"},
        {"layers_pattern": ["(a|a|[a-z.]+)+!"]},
    ],
)
def test_an_expression_that_does_not_end_is_told(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expressions, "SECONDS", 1.0)
    began = time.monotonic()
    problem = endless({"r": 8, "task_type": "SEQ_CLS?", **config}, _NAMES)
    assert problem.startswith("holds an expression that takes too long to match: '(")
    assert time.monotonic() - began < 8.0


@pytest.mark.parametrize(
    "text",
    [
        r".*\.(q_proj|v_proj)",
        r"^(?!.*vision).*(?:q_proj|k_proj|v_proj|o_proj)$",
        # As Unsloth writes it for models of images and texts.
        r"(?:.*?(?:vision|image|language|text).*?(?:self_attn|attn|mlp).*?(?:q_proj|up_proj).*?)",
        "(",
        "*a",
        "(" * 5000 + "|",
    ],
)
def test_any_other_text_is_left_to_peft(text: str) -> None:
    config = {"target_modules": text, "rank_pattern": {text: 4}, "layers_pattern": [text, 3, None]}
    assert endless(config, _NAMES) == ""
