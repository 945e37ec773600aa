"""Frozen weights in 4 or 8 bits, through transformers' quantization configurations.

Only the linear modules inside the blocks are quantized: embeddings, heads and normalizations stay
as they are. Sources: LLM.int8 arXiv 2208.07339, QLoRA arXiv 2305.14314.
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
from autopeft.utils.quiet import QUANTIZERS, quiet_loggers, silence

NONE = "none"
"""The weights stay as they are."""

_MARKS = ("is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer")
"""What transformers leaves on a quantized model and peft looks for."""

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Scheme:
    """One way to store weights.

    Attributes:
        name: As in the settings.
        package: What it needs.
        bits: Of a weight.
        block: Weights that share a scale; 0: those of one output.
        module_bytes: What it keeps for each module besides: its code book.
        keeps_input: True if a module keeps its input for the backward pass, where that is to have a
            gradient.
        takes_conv1d: True if it can store the weights of GPT-2's Conv1D.
    """

    name: str
    package: str
    bits: int
    block: int = 0
    module_bytes: int = 0
    keeps_input: bool = False
    takes_conv1d: bool = True

    def weight_bytes(self, shape: Shape) -> int:
        """What the weight of one module takes, its scales included."""
        weights = shape[0] * shape[1]
        scales = math.ceil(weights / self.block) if self.block else shape[0]
        return math.ceil(weights * self.bits / 8) + scales * _FLOAT_BYTES + self.module_bytes

    def config(self, kept: list[str]) -> Any:
        """The configuration for transformers; modules at the patterns `kept` stay as they are."""
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
            # What is computed in is up to autocast, as for any other module.
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=kept,
        )

    def quantized(self, module: nn.Linear) -> nn.Module:
        """One module, quantized without transformers."""
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
"""By name. torchao's 4-bit weights are not among them: they have no backward pass."""


def scheme_of(name: str) -> Scheme:
    """The scheme of that name.

    Raises:
        SettingsError: if there is none.
    """
    if name not in SCHEMES:
        raise SettingsError(
            "quantization", name, "no such scheme", f"use one of {', '.join((NONE, *SCHEMES))}"
        )
    return SCHEMES[name]


def check_backend(name: str, device: str) -> None:
    """Raises unless weights can be stored like that and trained over here.

    Args:
        name: A scheme's name, or "none".
        device: "cpu", "cuda"...; a GPU that only other machines have is not tried.

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
    if device.startswith("cuda") and not torch.cuda.is_available():
        return
    try:
        with quiet_loggers(*QUANTIZERS):
            module = scheme.quantized(nn.Linear(64, 64, device=device).requires_grad_(False))
            x = torch.ones(2, 64, device=device, requires_grad=True)
            module(x).sum().backward()
    except Exception as error:  # Backends raise whatever their kernels raise.
        raise SettingsError(
            "quantization",
            name,
            f"{scheme.package} does not run on {device} ({first_line(error)})",
            "use another scheme, or none",
        ) from error


def quantized_modules(model: nn.Module, blocks: tuple[str, ...], name: str) -> dict[str, Shape]:
    """Path -> (out, in) of the modules that are quantized.

    Args:
        model: The model before that; may be on `meta`.
        blocks: Paths of its blocks.
        name: The scheme's name.
    """
    scheme = scheme_of(name)
    # T5 computes wrongly unless some of its modules keep all their bits; transformers sees to it.
    exempt = list(getattr(model, "_keep_in_fp32_modules", None) or ())
    found: dict[str, Shape] = {}
    for path, module in model.named_modules():
        if not path.startswith(tuple(f"{block}." for block in blocks)):
            continue
        if not should_convert_module(path, exempt):
            continue
        if type(module) is nn.Linear:
            found[path] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D) and scheme.takes_conv1d:
            found[path] = (int(module.weight.shape[1]), int(module.weight.shape[0]))
    if not found:
        raise SettingsError(
            "quantization", name, "the model has no module it could store", "use none"
        )
    return found


def load_arguments(
    model: nn.Module, blocks: tuple[str, ...], name: str, device: str
) -> dict[str, Any]:
    """What `from_pretrained` takes to quantize a model on a device.

    Args:
        model: The same model on `meta`.
        blocks: Paths of its blocks.
        name: The scheme's name.
        device: Where it will be.
    """
    inside = quantized_modules(model, blocks, name)
    outside = [
        # In brackets: a bare name would also match the end of a longer one.
        f"(?:{re.escape(path)})"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and path not in inside
    ]
    return {"quantization_config": scheme_of(name).config(outside), "device_map": {"": device}}


def pass_marks(model: nn.Module, holder: nn.Module) -> None:
    """Tells peft about a holder's modules what transformers has noted on their model."""
    for mark in _MARKS:
        value = getattr(model, mark, None)
        if value is not None:
            setattr(holder, mark, value)


def is_quantized(model: nn.Module) -> bool:
    """True if transformers has quantized the model."""
    return bool(getattr(model, "is_quantized", False))


def steady(model: nn.Module) -> None:
    """Keeps a quantized model as it was loaded, and quiet.

    On some CPUs bitsandbytes would repack 4-bit weights at the first evaluation: for good, with
    scales rounded to 16 bits, and not for every shape. There peft puts an 8-bit weight anew on the
    device where it is, and bitsandbytes then loses its scales. And it tells at every step that it
    computes 8-bit products in 16 bits.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        weight = module._parameters.get("weight")
        if type(weight).__name__ == "Int8Params":
            weight.to = _Staying(weight)  # type: ignore[union-attr, method-assign]
    silence("bitsandbytes.autograd._functions")


class _Staying:
    """A weight's `to` that gives the weight itself where nothing is to change."""

    def __init__(self, weight: Any) -> None:
        self._weight, self._to = weight, weight.to

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and args == (self._weight.device,):
            return self._weight
        return self._to(*args, **kwargs)


def shrunk(table: PriceTable, modules: Mapping[str, Shape], name: str) -> PriceTable:
    """The price table of the same model with its weights quantized.

    FLOPs stay: weights are unpacked to be multiplied. Room to unpack the largest of them counts as
    weights.

    Args:
        table: Of the model as it is.
        modules: Path -> (out, in) of what is quantized.
        name: The scheme's name.
    """
    scheme = scheme_of(name)
    before = sum(out * in_ for out, in_ in modules.values()) * _FLOAT_BYTES
    after = sum(scheme.weight_bytes(shape) for shape in modules.values())
    room = max(out * in_ for out, in_ in modules.values()) * _FLOAT_BYTES
    blocks = table.blocks
    if scheme.keeps_input:
        blocks = tuple(_keeping_inputs(block) for block in blocks)
    return replace(table, weight_bytes=table.weight_bytes - before + after + room, blocks=blocks)


def _keeping_inputs(block: BlockCosts) -> BlockCosts:
    """A block whose linear modules keep their inputs wherever these need a gradient."""

    def named(role: str) -> str:
        return block.input_of.get(role, role)

    usages = {}
    for sources, usage in block.usages.items():
        kept: dict[str, float] = {}
        for role in usage.live_inputs.intersection(LINEAR_ROLES):
            if named(role) != ENCODER:  # All blocks read that, and keep it once.
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
