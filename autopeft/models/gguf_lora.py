"""Write a LoRA as a GGUF file, which llama.cpp and Ollama load over a GGUF base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from autopeft.errors import AdapterError
from autopeft.models.lora_conversion import Factors
from autopeft.serving.gguf_names import ARCHITECTURES
from autopeft.utils.files import write_text

GGUF_FILE = "adapter.gguf"
MODEL_FILE = "Modelfile"


def write_gguf(factors: Mapping[str, Factors], config: Any, folder: Path) -> Path:
    """Write `adapter.gguf`, all of whose tensors have one rank, which is alpha.

    Args:
        factors: Module path -> LoRA with scaling 1, all of one rank.
        config: The base model's configuration.
        folder: Where to write.

    Raises:
        AdapterError: if the package gguf is missing, or llama.cpp has no place for a module.
    """
    try:
        import gguf
    except ImportError:
        raise AdapterError(
            "format", "gguf", "needs the package gguf", 'pip install "autopeft[gguf]"'
        ) from None
    text = config.get_text_config()
    known = ARCHITECTURES.get(text.model_type)
    if known is None:
        raise AdapterError(
            "format",
            "gguf",
            f"models of type {text.model_type} have no known GGUF names",
            f"export as merged, or use one of {', '.join(ARCHITECTURES)}",
        )
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[known.name], text.num_hidden_layers)
    (rank,) = {found.rank for found in factors.values()}
    tensors: dict[str, torch.Tensor] = {}
    for place, found in factors.items():
        name = names.get_name(place.removeprefix(known.prefix) + ".weight", (".weight",))
        if name is None or found.n_experts:
            raise AdapterError(
                "format", "gguf", f"llama.cpp has no place for {place}", "export as merged"
            )
        b = _permuted(place, found.b, text) if known.permutes else found.b
        tensors |= {f"{name}.lora_a": found.a, f"{name}.lora_b": b}
    path = folder / GGUF_FILE
    writer = gguf.GGUFWriter(path, known.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.cpu().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_shapes(model: torch.nn.Module, config: Any) -> dict[str, tuple[int, int]]:
    """Return GGUF's name of each weight of a model's modules -> (out, in), as far as it is known.

    Args:
        model: The model; it may be without weights.
        config: Its configuration.
    """
    import gguf

    text = config.get_text_config()
    known = ARCHITECTURES.get(text.model_type)
    if known is None:
        return {}
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[known.name], text.num_hidden_layers)
    found: dict[str, tuple[int, int]] = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        name = names.get_name(f"{path.removeprefix(known.prefix)}.weight", (".weight",))
        if name is None or not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            continue
        first, second = weight.shape
        found[name] = (second, first) if isinstance(module, Conv1D) else (first, second)
    return found


def _permuted(path: str, b: torch.Tensor, config: Any) -> torch.Tensor:
    """Return B (out, rank) with its rows in the order of llama.cpp's queries and keys."""
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    }.get(path.rpartition(".")[2])
    if heads is None:
        return b
    return b.reshape(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)


def write_modelfile(base_model: str, folder: Path) -> None:
    """Write Ollama's `Modelfile` beside an `adapter.gguf`."""
    lines = [
        "# FROM takes a folder with safetensors, a GGUF file, or a model of Ollama's library.",
        f"FROM {base_model}",
        f"ADAPTER ./{GGUF_FILE}",
    ]
    write_text(folder / MODEL_FILE, "\n".join(lines) + "\n")
