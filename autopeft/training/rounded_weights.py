"""Rounds frozen weights to bf16 once, not in every step.

Autocast rounds a weight whenever it is used, and keeps the result until the backward pass only. Of
a frozen weight that result is always the same; on a CPU, rounding all of a model's takes as long as
several percent of a training step. Kept copies need no more memory than the step's own did.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary
from transformers.pytorch_utils import Conv1D

from autopeft.training.precision import Precision

_COPIES: MutableMapping[torch.Tensor, tuple[int, torch.Tensor]] = WeakIdKeyDictionary()
"""Weight -> its version when it was rounded, and the copy; both go when the weight goes."""


@contextmanager
def rounded_once(model: nn.Module, precision: Precision, device: str) -> Iterator[None]:
    """A context in which linear modules under bf16 autocast use kept copies of frozen weights.

    The result is bit for bit the same. `module.weight` stays what it was, for methods that read it.
    Does nothing on an accelerator, whose memory is dear and where rounding is a trifle.

    Args:
        model: With its adapters.
        precision: What is computed in.
        device: Where.
    """
    if precision != "bf16" or torch.device(device).type != "cpu":
        yield
        return
    with ExitStack() as stack:
        for module in model.modules():
            if _is_frozen_linear(module):
                # An attribute of the instance hides the method of its class.
                stack.callback(delattr, module, "forward")
                module.forward = partial(_forward, module)
        yield


def _is_frozen_linear(module: nn.Module) -> bool:
    if type(module) not in (nn.Linear, Conv1D) or "forward" in vars(module):
        return False
    # A quantized weight is a tensor of a class of its own.
    return all(
        type(p) is nn.Parameter and p.dtype == torch.float32 and not p.requires_grad
        for p in module.parameters()
    )


def _forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    is_rounding = torch.is_autocast_enabled("cpu") and (
        torch.get_autocast_dtype("cpu") == torch.bfloat16
    )
    if not is_rounding:  # A model may compute a part of itself in fp32.
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    weight = _rounded(module.weight)  # type: ignore[arg-type]
    bias = None if module.bias is None else _rounded(module.bias)  # type: ignore[arg-type]
    if isinstance(module, Conv1D):
        assert bias is not None, "a Conv1D always has one"
        return torch.addmm(bias, x.flatten(0, -2), weight).view(*x.shape[:-1], -1)
    return functional.linear(x, weight, bias)


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    version, copy = _COPIES.get(weight, (-1, weight))
    if version != weight._version:
        # An evaluation may come first, and what is made in inference mode cannot be trained with.
        with torch.inference_mode(False), torch.no_grad():
            copy = weight.to(torch.bfloat16)
        _COPIES[weight] = (weight._version, copy)
    return copy
