"""fp32 or bf16: measured on this machine, not assumed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch

from autopeft.errors import SettingsError

Precision = Literal["fp32", "bf16"]

MIN_GAIN = 1.2
"""bf16 must be so much faster to be chosen: below that its rounding buys nothing."""


@dataclass(frozen=True)
class PrecisionChoice:
    """What trainings compute in, and why.

    Attributes:
        precision: "fp32", or "bf16" for bf16 autocast (weights and adapters stay fp32).
        measured_ms: Milliseconds of the probe by precision; empty if the user chose.
    """

    precision: Precision
    measured_ms: Mapping[str, float] = field(default_factory=dict)


def choose_precision(wanted: str, device: str, model: torch.nn.Module) -> PrecisionChoice:
    """The precision to train in.

    Args:
        wanted: "auto", "fp32" or "bf16".
        device: "cpu", "cuda", "cuda:1"...
        model: What is trained: wide matrices gain more than narrow ones.

    Raises:
        SettingsError: if there is no such precision.
    """
    if wanted == "fp32":
        return PrecisionChoice("fp32")
    if wanted == "bf16":
        return PrecisionChoice("bf16")
    if wanted != "auto":
        raise SettingsError("precision", wanted, "no such precision", "use auto, fp32 or bf16")
    config: Any = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None) or getattr(config, "d_model", None) or 768
    return _measured(device, int(width))


def autocast(precision: Precision, device: str) -> AbstractContextManager[Any]:
    """The context a forward pass runs in."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


@lru_cache(maxsize=16)
def _measured(device: str, width: int) -> PrecisionChoice:
    """Times a feed-forward block of the model's width in both, once a process."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_bf16_supported():
        return PrecisionChoice("fp32")
    up = torch.nn.Linear(width, 4 * width, device=device).requires_grad_(False)
    down = torch.nn.Linear(4 * width, width, device=device).requires_grad_(False)
    hidden = torch.randn(
        512, width, generator=torch.Generator().manual_seed(0), requires_grad=False
    ).to(device)
    milliseconds = {
        name: _probe_ms(up, down, hidden.clone().requires_grad_(), name, device)
        for name in ("fp32", "bf16")
    }
    is_faster = milliseconds["bf16"] * MIN_GAIN < milliseconds["fp32"]
    return PrecisionChoice("bf16" if is_faster else "fp32", milliseconds)


def _probe_ms(
    up: torch.nn.Module, down: torch.nn.Module, hidden: torch.Tensor, name: str, device: str
) -> float:
    """Fastest of some passes forward and back: the one least disturbed by other processes."""
    precision: Precision = "bf16" if name == "bf16" else "fp32"
    seconds = []
    for _ in range(6):
        synchronize(device)
        started = time.perf_counter()
        with autocast(precision, device):
            out = down(torch.nn.functional.gelu(up(hidden)))  # (512, width)
        out.float().sum().backward()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 1000 * min(seconds)


def synchronize(device: str) -> None:
    """Waits until an accelerator has done its work, so that a clock tells the truth."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
