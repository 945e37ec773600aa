"""Short whole searches in this process, and what the saved adapter computes from outside."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import soundfile
import torch
import transformers
from peft import PeftModel

import autopeft
from autopeft.models.export import export_adapter
from autopeft.utils.quiet import quiet_peft, quiet_transformers

SHORT: dict[str, Any] = {
    "budget": "4trials",
    "steps": 12,
    "batch_size": 8,
    "confirm_seeds": 1,
    "max_finalists": 1,
    "backend": "local",
    "precision": "fp32",
    "space": {"methods": {"lora": {"ranks": [2, 4]}}},
}


@dataclass(frozen=True)
class Searched:
    """A finished search.

    Attributes:
        base: Folder of the base model.
        adapter: Folder of the best adapter.
        score: Its metrics on the test rows, as in front.json.
        test_rows: Index of each test row in its source.
    """

    base: str
    adapter: Path
    score: Mapping[str, float]
    test_rows: list[int]


def searched(model: Path, data: Path, output: Path, **settings: Any) -> Searched:
    """Search, run the model cards, and read what front.json says of the best adapter."""
    asked = {**SHORT, **settings, "model": str(model), "data": str(data), "output": str(output)}
    result = autopeft.search(asked)
    front = json.loads((result.folder / "front.json").read_text())
    best = next(m for m in front["front"] if m["digest"] == front["best"])
    for format in ("peft", "merged"):
        run_card(output, output.with_name(f"{output.name}-{format}"), format)
    rows = json.loads((result.folder / "state" / "splits.json").read_text())["test"]["rows"]
    return Searched(result.base_model, result.folder / best["adapter"], best["adapter_score"], rows)


def run_card(output: Path, target: Path, format: str) -> dict[str, Any]:
    """Export the best adapter, run the code of its model card, and return that code's names."""
    autopeft.export(output, format=format, to=target)
    card = (target / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert "checkpoint" in code.partition("checkpoint = ")[2]  # it is used, not loaded only
    code = code.replace("path/to/this/folder", str(target)).replace("path/to", str(target))
    PIL.Image.new("RGB", (20, 12)).save(target / "image.png")
    soundfile.write(target / "recording.wav", np.sin(np.arange(8000) / 9), 16_000)
    names: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), names)
    return names


def loads(found: Searched, auto_class: str, target: Path) -> dict[str, Any]:
    """The adapter loaded by autopeft, by peft alone, and merged by plain transformers."""
    loader = getattr(transformers, auto_class)
    kwargs = json.loads((found.adapter / "plan.json").read_text())["model_kwargs"]
    if "id2label" in kwargs:
        kwargs["id2label"] = {int(key): name for key, name in kwargs["id2label"].items()}
    export_adapter(found.base, found.adapter, target, format="merged")
    with quiet_transformers(), quiet_peft():
        plain = loader.from_pretrained(found.base, **kwargs)
        return {
            "autopeft": autopeft.load_adapter(found.base, found.adapter),
            "peft": PeftModel.from_pretrained(plain, str(found.adapter)).eval(),
            "merged": loader.from_pretrained(target).eval(),
        }


def logits_of(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    """The model's logits, without a graph."""
    with torch.inference_mode():
        logits: torch.Tensor = model(**inputs).logits
    return logits
