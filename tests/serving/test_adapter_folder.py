from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from autopeft.errors import AdapterError
from autopeft.serving.servers import check_export
from autopeft.utils import expressions


def test_an_expression_without_an_end_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expressions, "SECONDS", 1.0)
    config = {"peft_type": "LORA", "r": 4, "target_modules": "(.*.*.*.*.*.*.*.*.*a)*b!"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: np.zeros((4, 8), np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="takes too long to match") as caught:
        check_export(tmp_path, "vllm")
    assert len(str(caught.value).splitlines()) == 1
