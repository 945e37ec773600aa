"""Chooses fp32 or bf16 by measurement, and keeps frozen weights rounded to bf16.

Autocast rounds a weight at every use and keeps the result until the backward pass only. A frozen
weight always rounds to the same values, and on a CPU rounding a whole model takes several percent
of a training step. `rounded_once` keeps the copies; they need no more memory than autocast's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary
from transformers.pytorch_utils import Conv1D

from autopeft.errors import SettingsError
from autopeft.training.acceleration import verified
from autopeft.utils.device import is_accelerator, supports_bf16, synchronize

Precision = Literal["fp32", "bf16"]
"""bf16 is bf16 autocast: weights and adapters stay fp32."""

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")

MIN_GAIN = 1.2
"""bf16 is chosen only if it is this many times as fast as fp32, to be worth its rounding."""


def choose_precision(wanted: str, device: str, config: Any) -> Precision:
    """Return the precision to train in.

    "auto" is bf16 on an accelerator that computes in it. On a CPU it measures: wide matrices gain
    more than narrow ones.

    Args:
        wanted: "auto", "fp32" or "bf16".
        device: Device of the trainings.
        config: The model's configuration, from transformers.

    Raises:
        SettingsError: if there is no such precision.
    """
    for precision in PRECISIONS:
        if precision == wanted:
            return precision
    if wanted != "auto":
        raise SettingsError("precision", wanted, "no such precision", "use auto, fp32 or bf16")
    if is_accelerator(device):
        return "bf16" if supports_bf16(device) else "fp32"
    width = getattr(config, "hidden_size", None) or getattr(config, "d_model", None) or 768
    return _measured(device, int(width))


def autocast(precision: Precision, device: str) -> AbstractContextManager[Any]:
    """Return the context of a forward pass."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


@lru_cache(maxsize=16)
def _measured(device: str, width: int) -> Precision:
    """Time a feed-forward block of the model's width in both, once per process."""
    up = nn.Linear(width, 4 * width, device=device).requires_grad_(False)
    down = nn.Linear(4 * width, width, device=device).requires_grad_(False)
    hidden = torch.randn(512, width, generator=torch.Generator().manual_seed(0)).to(device)
    fp32, bf16 = (
        _seconds(up, down, hidden.clone().requires_grad_(), precision, device)
        for precision in PRECISIONS
    )
    return "bf16" if bf16 * MIN_GAIN < fp32 else "fp32"


def _seconds(
    up: nn.Module, down: nn.Module, hidden: torch.Tensor, precision: Precision, device: str
) -> float:
    """Return the seconds of the fastest of some passes forward and back."""

    def run() -> None:
        with autocast(precision, device):
            out = down(functional.gelu(up(hidden)))  # (512, width)
        out.float().sum().backward()

    return min(seconds_of(run, device) for _ in range(6))


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Return the seconds of a call, all its work on an accelerator included."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


_COPIES: MutableMapping[torch.Tensor, tuple[int, torch.Tensor]] = WeakIdKeyDictionary()
"""Weight -> its version when it was rounded, and the copy. Entries disappear with their weights."""

_IS_EXACT: dict[type[nn.Module], bool] = {}
"""Class of a module -> whether copies gave its own result, in the first call."""


@contextmanager
def rounded_once(model: nn.Module, precision: Precision, device: str) -> Iterator[None]:
    """Make linear modules use kept bf16 copies of their frozen weights within this context.

    The result is bit for bit the same. `module.weight` is unchanged, for methods that read it.
    Does nothing on an accelerator: memory is scarce there, and rounding is cheap.
    """
    if precision != "bf16" or is_accelerator(device):
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
    # A quantized weight has a tensor class of its own.
    return all(
        type(p) is nn.Parameter and p.dtype == torch.float32 and not p.requires_grad
        for p in module.parameters()
    )


def _forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    is_rounding = torch.is_autocast_enabled("cpu") and (
        torch.get_autocast_dtype("cpu") == torch.bfloat16
    )
    kind = type(module)
    if torch.compiler.is_compiling():
        return kind.forward(module, x)  # type: ignore[no-any-return]
    if not (is_rounding and _IS_EXACT.get(kind, True)):  # Parts of a model may compute in fp32.
        return kind.forward(module, x)  # type: ignore[no-any-return]
    result = _with_copies(module, x)
    if kind not in _IS_EXACT:
        with torch.no_grad():
            plain = kind.forward(module, x)
        what = f"rounding weights of {kind.__name__} once"
        _IS_EXACT[kind] = verified(result.detach(), plain, 0.0, what=what)
    return result


def _with_copies(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    weight = _rounded(module.weight)  # type: ignore[arg-type]
    bias = None if module.bias is None else _rounded(module.bias)  # type: ignore[arg-type]
    if isinstance(module, Conv1D):
        assert bias is not None, "a Conv1D always has one"
        return torch.addmm(bias, x.flatten(0, -2), weight).view(*x.shape[:-1], -1)
    return functional.linear(x, weight, bias)


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    version, copy = _COPIES.get(weight, (-1, weight))
    if version != weight._version:
        # The first call may be an evaluation's, and a training cannot use inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            copy = weight.to(torch.bfloat16)
        _COPIES[weight] = (weight._version, copy)
    return copy
