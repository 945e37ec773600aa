"""Frozen weights in 4 or 8 bits, with transformers' quantization configurations.

Only the linear modules inside the blocks are quantized, not embeddings, heads and normalizations.
Sources: LLM.int8 arXiv 2208.07339, QLoRA arXiv 2305.14314.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from autopeft.costs import BlockCosts, PriceTable, Shape
from autopeft.costs.usage import ENCODER
from autopeft.errors import SettingsError
from autopeft.methods import LINEAR_ROLES
from autopeft.models.loading import first_line
from autopeft.utils.device import is_here
from autopeft.utils.quiet import QUANTIZERS, quiet_loggers, silence

NONE = "none"
"""The scheme that leaves weights as they are."""

_MARKS = ("is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer")
"""Attributes that transformers sets on a quantized model and peft reads."""

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Scheme:
    """One way to store weights.

    Attributes:
        name: Its name in the settings.
        package: The package that it needs.
        bits: Bits of a weight.
        block: Weights that share a scale; 0: all of one output.
        module_bytes: Further bytes for each module: its code book.
        keeps_input: Whether a module keeps its input for the backward pass, where the input needs a
            gradient.
        takes_conv1d: Whether it can store the weights of GPT-2's Conv1D.
    """

    name: str
    package: str
    bits: int
    block: int = 0
    module_bytes: int = 0
    keeps_input: bool = False
    takes_conv1d: bool = True

    def weight_bytes(self, shape: Shape, *, quantizes_scales: bool = False) -> int:
        """Return the bytes of one module's weight, scales included, perhaps these quantized too."""
        weights = shape[0] * shape[1]
        scales = math.ceil(weights / self.block) if self.block else shape[0]
        scale_bytes = float(scales * _FLOAT_BYTES)
        if quantizes_scales and self.block:
            # A byte each, a second code book, and a float for each 256 of them.
            scale_bytes = scales + 1024 + math.ceil(scales / 256) * _FLOAT_BYTES
        return math.ceil(weights * self.bits / 8) + math.ceil(scale_bytes) + self.module_bytes

    def config(self, kept: list[str], dtype: torch.dtype = torch.float32) -> Any:
        """Return transformers' configuration; modules that match `kept` are not quantized.

        Scales of a model that is otherwise in bf16 are quantized too.
        """
        if self.package == "torchao":
            from torchao.quantization import Int8WeightOnlyConfig
            from transformers import TorchAoConfig

            return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=kept)
        from transformers import BitsAndBytesConfig

        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            # Autocast decides the precision, as for any other module.
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=dtype == torch.bfloat16,
            llm_int8_skip_modules=kept,
        )

    def quantized(self, module: nn.Linear) -> nn.Module:
        """Return one module quantized without transformers."""
        if self.package == "torchao":
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(module, Int8WeightOnlyConfig())
            return module
        import bitsandbytes as bnb

        made = (
            bnb.nn.Linear8bitLt(module.in_features, module.out_features, has_fp16_weights=False)
            if self.bits == 8
            else bnb.nn.Linear4bit(module.in_features, module.out_features, quant_type="nf4")
        )
        made.load_state_dict(module.state_dict())
        return made.to(module.weight.device)  # type: ignore[no-any-return]


SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        # 64 weights share a scale; a level is one of 16 floats.
        Scheme("bnb-4bit", "bitsandbytes", bits=4, block=64, module_bytes=64),
        Scheme("bnb-8bit", "bitsandbytes", bits=8, keeps_input=True),
        Scheme("torchao-int8", "torchao", bits=8, takes_conv1d=False),
    )
}
"""Schemes by name. torchao's 4-bit weights have no backward pass and are left out."""


def scheme_of(name: str) -> Scheme:
    """Return the scheme of that name.

    Raises:
        SettingsError: if there is none.
    """
    if name not in SCHEMES:
        raise SettingsError(
            "quantization", name, "no such scheme", f"use one of {', '.join((NONE, *SCHEMES))}"
        )
    return SCHEMES[name]


def check_backend(name: str, device: str) -> None:
    """Check that a scheme works on a device of this machine, by one step of training.

    Args:
        name: A scheme's name, or "none".
        device: As torch names it; one that this machine lacks is not tried.

    Raises:
        SettingsError: if its package is missing, or does not run on the device.
    """
    if name == NONE:
        return
    scheme = scheme_of(name)
    if importlib.util.find_spec(scheme.package) is None:
        raise SettingsError(
            "quantization",
            name,
            f"{scheme.package} is not installed",
            'run: pip install "autopeft[quant]"',
        )
    if not is_here(device):
        return
    try:
        with quiet_loggers(*QUANTIZERS):
            module = scheme.quantized(nn.Linear(64, 64, device=device).requires_grad_(False))
            x = torch.ones(2, 64, device=device, requires_grad=True)
            module(x).sum().backward()
    except Exception as error:  # Kernels may raise anything.
        raise SettingsError(
            "quantization",
            name,
            f"{scheme.package} does not run on {device} ({first_line(error)})",
            "use another scheme, or none",
        ) from error


def quantized_modules(model: nn.Module, blocks: tuple[str, ...], name: str) -> dict[str, Shape]:
    """Return path -> (out, in) of the modules in an unquantized model that a scheme quantizes."""
    scheme = scheme_of(name)
    # T5 needs full precision in some modules; transformers keeps it there.
    exempt = list(getattr(model, "_keep_in_fp32_modules", None) or ())
    found: dict[str, Shape] = {}
    for path, module in model.named_modules():
        is_inside = path.startswith(tuple(f"{block}." for block in blocks))
        if not is_inside or not should_convert_module(path, exempt):
            continue
        if type(module) is nn.Linear:
            found[path] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D) and scheme.takes_conv1d:
            found[path] = (int(module.weight.shape[1]), int(module.weight.shape[0]))
    if not found:
        raise SettingsError(
            "quantization", name, "the model has no module that it can quantize", "use none"
        )
    return found


def weight_bytes(
    model: nn.Module, blocks: tuple[str, ...], name: str, dtype: torch.dtype
) -> dict[str, float]:
    """Return the bytes of each block's weights, and of all else under "", for a model on `meta`.

    Args:
        model: The model, not quantized.
        blocks: Path of each block.
        name: A scheme's name, or "none".
        dtype: Type of what is not quantized.
    """
    paths = dict.fromkeys(blocks)
    inside = {} if name == NONE else quantized_modules(model, blocks, name)
    found = dict.fromkeys((*paths, ""), 0.0)
    for path, parameter in model.named_parameters():
        owner, _, last = path.rpartition(".")
        block = next((each for each in paths if path.startswith(f"{each}.")), "")
        if last == "weight" and owner in inside:
            scheme, is_bf16 = scheme_of(name), dtype == torch.bfloat16
            found[block] += scheme.weight_bytes(inside[owner], quantizes_scales=is_bf16)
        else:
            found[block] += parameter.numel() * dtype.itemsize
    return found


def load_arguments(
    model: nn.Module, blocks: tuple[str, ...], name: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that load a model on `meta`, but quantized.

    What is not quantized has the `dtype`.
    """
    inside = quantized_modules(model, blocks, name)
    outside = [
        # In brackets: a bare name would also match the end of a longer one.
        f"(?:{re.escape(path)})"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and path not in inside
    ]
    return {"quantization_config": scheme_of(name).config(outside, dtype)}


def pass_marks(model: nn.Module, holder: nn.Module) -> None:
    """Copy transformers' marks of quantization from a model to a holder of its modules."""
    for mark in _MARKS:
        if getattr(model, mark, None) is not None:
            setattr(holder, mark, getattr(model, mark))


def is_quantized(model: nn.Module) -> bool:
    """Return whether transformers has quantized the model."""
    return bool(getattr(model, "is_quantized", False))


def keep_weights(model: nn.Module) -> None:
    """Keep bitsandbytes from changing a loaded model's weights and from logging at each step."""
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes would repack 4-bit weights at the first evaluation
        # (bitsandbytes-foundation/bitsandbytes#1804): permanently, with scales rounded to 16 bits,
        # and not for every shape.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        weight = module._parameters.get("weight")
        # peft moves an 8-bit weight to the device where it already is, and bitsandbytes then loses
        # its scales (no upstream issue known).
        if type(weight).__name__ == "Int8Params":
            weight.to = _SameDevice(weight)  # type: ignore[union-attr, method-assign]
    # It says at each step that 8-bit products are computed in 16 bits (huggingface/peft#2424).
    silence("bitsandbytes.autograd._functions")


class _SameDevice:
    """A weight's `to` that returns the weight itself if the device stays the same."""

    def __init__(self, weight: Any) -> None:
        self._weight, self._to = weight, weight.to

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and args == (self._weight.device,):
            return self._weight
        return self._to(*args, **kwargs)


def quantized_table(table: PriceTable, modules: Mapping[str, Shape], name: str) -> PriceTable:
    """Return the price table of the same model with quantized weights.

    FLOPs stay the same: weights are unpacked before they are multiplied. Memory to unpack the
    largest one counts as weights.
    """
    scheme = scheme_of(name)
    # Weights and activations are priced in one type.
    sizes = [out * in_ * table.float_bytes for out, in_ in modules.values()]
    is_bf16 = table.float_bytes == 2
    quantized = sum(scheme.weight_bytes(m, quantizes_scales=is_bf16) for m in modules.values())
    blocks = table.blocks
    if scheme.keeps_input:
        blocks = tuple(_keeping_inputs(block) for block in blocks)
    weight_bytes = table.weight_bytes - sum(sizes) + quantized + max(sizes)
    return replace(table, weight_bytes=weight_bytes, blocks=blocks)


def _keeping_inputs(block: BlockCosts) -> BlockCosts:
    """Return a block whose linear modules keep their inputs where these need a gradient."""

    def named(role: str) -> str:
        return block.input_of.get(role, role)

    usages = {}
    for sources, usage in block.usages.items():
        kept: dict[str, float] = {}
        for role in usage.live_inputs.intersection(LINEAR_ROLES):
            if named(role) != ENCODER:  # All decoder blocks read it, and it is kept once.
                kept[named(role)] = max(
                    kept.get(named(role), 0.0), usage.input_bytes.get(role, 0.0)
                )
        usages[sources] = replace(
            usage,
            saved_bytes=usage.saved_bytes + sum(kept.values()),
            input_bytes={
                role: 0.0 if role in LINEAR_ROLES and named(role) in kept else size
                for role, size in usage.input_bytes.items()
            },
        )
    return replace(block, usages=usages)
