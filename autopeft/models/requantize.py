"""Merge adapters that were trained over quantized weights, and quantize the result again.

What the adapter was trained over are the rounded weights, so these are dequantized, merged in fp32,
and quantized by the same scheme. Modules without an adapter then keep their weights: what was
rounded is rounded to itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from autopeft.errors import AdapterError, SettingsError
from autopeft.models.attach import Attached
from autopeft.models.backbone import Backbone, load_backbone
from autopeft.models.loading import prepare_config, restore_config
from autopeft.models.quantization import NONE, SCHEMES, keep_weights
from autopeft.utils.quiet import QUANTIZERS, quiet_loggers, quiet_transformers

_CLASSES = ("Params4bit", "Int8Params")
"""Classes of bitsandbytes' weights."""


def check_requantizable(quantization: str) -> None:
    """Check that a merged model can be stored in a scheme.

    Raises:
        SettingsError: if the base model was not quantized, or its scheme has no files that
            transformers loads.
    """
    if quantization == NONE:
        problem, remedy = "the base model of this search was not quantized", "leave it out"
        raise SettingsError("requantize", True, problem, remedy)
    if SCHEMES[quantization].package != "bitsandbytes":
        problem = f"{quantization} has no safetensors files that every transformers loads"
        raise SettingsError("requantize", True, problem, "leave it out, to write whole weights")


def dequantize_into(quantized: Backbone, whole: Attached) -> None:
    """Give whole weights the values that the quantized ones of the same base model stand for.

    Args:
        quantized: The base model without adapters.
        whole: The same model in full precision, adapters attached.

    Raises:
        AdapterError: if no module is quantized.
    """
    n_modules = 0
    for path, module in quantized.model.named_modules():
        weight = module._parameters.get("weight")
        if type(weight).__name__ not in _CLASSES:
            continue
        # It moves an 8-bit weight, after which `keep_weights` must see it again.
        values = dequantize_module_weight(module).detach().float()
        own: Any = whole.originals.get(path) or whole.model.get_submodule(path)
        values = values.t() if isinstance(own, Conv1D) else values
        with torch.no_grad():
            own.weight.copy_(values)
        n_modules += 1
    keep_weights(quantized.model)
    if not n_modules:
        raise AdapterError("adapter", quantized.base_model, "no weight is quantized", "merge it")


def quantized_copy(
    merged: Path,
    folder: Path,
    backbone: Backbone,
    *,
    quantization: str,
    device: str,
    dtype: str,
    max_shard_size: int,
) -> None:
    """Write a merged model again with quantized weights.

    Args:
        merged: Folder of the merged model in full precision.
        folder: Folder to write.
        backbone: Tells how the model is loaded.
        quantization: The scheme.
        device: Where to quantize.
        dtype: Type of what is not quantized.
        max_shard_size: The largest file of weights, in bytes.
    """
    loaded = load_backbone(
        str(merged),
        auto_class=backbone.auto_class,
        device=device,
        dtype=dtype,
        role_map=backbone.role_map,
        quantization=quantization,
    )
    model: Any = loaded.model
    restore_config(model.config, loaded.config_before)
    try:
        with quiet_transformers(), quiet_loggers(*QUANTIZERS):
            model.save_pretrained(folder, max_shard_size=max_shard_size)
    finally:
        prepare_config(model.config)


def load_written(folder: Path, auto_class: str, *, device: str, dtype: str) -> nn.Module:
    """Load a folder of a whole model, quantized or not, as transformers alone does."""
    found = load_backbone(str(folder), auto_class=auto_class, device=device, dtype=dtype)
    keep_weights(found.model)
    return found.model
