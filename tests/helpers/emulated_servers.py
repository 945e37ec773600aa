"""Models with an adapter as servers load it: written from their sources, apart from autopeft's.

Each loader reads the files itself and changes the weights of a plain model of transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D


class Refused(Exception):
    """The server would not load it."""


def as_vllm(model: Any, folder: Path, *, max_lora_rank: int = 16) -> Any:
    """One scaling for all modules, of the configuration; buffers of `max_lora_rank`."""
    config, factors = _files(folder)
    if config.get("modules_to_save") or config.get("use_dora"):
        raise Refused("modules_to_save or DoRA")
    if config["r"] > max_lora_rank:
        raise Refused("rank above max_lora_rank")
    if max_lora_rank not in (1, 8, 16, 32, 64, 128, 256, 320, 512):
        raise Refused("no such max_lora_rank")
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    for path, (a, b) in factors.items():
        if len(a) > max_lora_rank:
            raise Refused(f"the buffer of {path} overruns")
        _add(model, path, b @ a * (config["lora_alpha"] / root))
    return model


def as_sglang(model: Any, folder: Path) -> Any:
    """One rank and one scaling for all modules, of the configuration; no patterns.

    Queries, keys and values go into one buffer, which starts at the queries and asks for the
    values; gate and up into another, which starts at the gate. What no buffer takes is lost.
    """
    config, factors = _files(folder)
    if isinstance(config["target_modules"], str):
        raise Refused(f"target_modules={config['target_modules']}")
    for path in factors:
        parent, _, name = path.rpartition(".")
        start = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(name)
        needed = [start] if start else ["v_proj"] if name == "q_proj" else []
        if any(f"{parent}.{each}" not in factors for each in needed):
            raise Refused(f"{path} without {needed}")
    for path, (a, b) in factors.items():
        if len(a) != config["r"]:
            raise Refused(f"shape of {path}")
        _add(model, path, b @ a * (config["lora_alpha"] / config["r"]))
    return model


def as_llama_cpp(model: Any, folder: Path) -> Any:
    """What its converter makes of a PEFT folder: the alpha of the file / own rank of a tensor."""
    config, factors = _files(folder)
    for path, (a, b) in factors.items():
        _add(model, path, b @ a * (config["lora_alpha"] / len(a)))
    return model


def _files(
    folder: Path,
) -> tuple[Mapping[str, Any], Mapping[str, tuple[torch.Tensor, torch.Tensor]]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    strange = [n for n in tensors if not n.endswith((".lora_A.weight", ".lora_B.weight"))]
    if strange:
        raise Refused(f"unexpected {strange[0]}")
    paths = {name.rsplit(".lora_", 1)[0] for name in tensors}
    return config, {
        path.removeprefix("base_model.model."): (
            tensors[f"{path}.lora_A.weight"],
            tensors[f"{path}.lora_B.weight"],
        )
        for path in paths
    }


def _add(model: Any, path: str, change: torch.Tensor) -> None:
    module = model.get_submodule(path)
    with torch.no_grad():
        module.weight += change.T if isinstance(module, Conv1D) else change
