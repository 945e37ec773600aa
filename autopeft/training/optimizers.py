"""The optimizer of trainings: torch's AdamW, or bitsandbytes' with moments in 8 bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autopeft.costs.memory import FP32_MOMENTS, Moments
from autopeft.errors import SettingsError
from autopeft.models.attach import ParameterGroup
from autopeft.models.loading import first_line
from autopeft.utils.device import is_accelerator, is_here
from autopeft.utils.quiet import QUANTIZERS, quiet_loggers

ADAMW = "adamw"

_BITSANDBYTES: Mapping[str, str] = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}
"""Name -> class of bitsandbytes. A paged one moves moments to the host where memory is short."""

_EIGHT_BITS = Moments(value_bytes=2 + 2 * 4 / 256, least_values=4096)
"""bitsandbytes has a scale in fp32 for 256 values of a moment, and keeps small tensors in fp32."""


def moments_of(name: str) -> Moments:
    """Return what an optimizer keeps in memory, by a value of the setting `optimizer`.

    Example:
        >>> from autopeft.training.optimizers import moments_of
        >>> moments_of("adamw").value_bytes, moments_of("adamw_8bit").value_bytes
        (8.0, 2.03125)
    """
    return FP32_MOMENTS if name == ADAMW else _EIGHT_BITS


def check_optimizer(name: str, device: str) -> None:
    """Check that an optimizer works on a device of this machine, by one step.

    Args:
        name: A value of the setting `optimizer`.
        device: As torch names it; one that this machine lacks is not tried.

    Raises:
        SettingsError: if its package is missing, or does not run on the device.
    """
    if name == ADAMW:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        problem = "bitsandbytes is not installed"
        raise SettingsError("optimizer", name, problem, 'run: pip install "autopeft[quant]"')
    if name.startswith("paged") and not is_accelerator(device):
        problem = f"{device} has no memory of its own to page from"
        raise SettingsError("optimizer", name, problem, "use adamw_8bit or adamw")
    if not is_here(device):
        return
    try:
        weight = torch.nn.Parameter(torch.ones(64, 64, device=device))
        weight.grad = torch.ones_like(weight)
        _of_bitsandbytes(name, [{"params": [weight], "lr": 1e-3}], 0.0).step()
    except Exception as error:  # Kernels may raise anything.
        problem = f"bitsandbytes does not run on {device} ({first_line(error)})"
        raise SettingsError("optimizer", name, problem, "use adamw") from error


def make_optimizer(
    name: str, groups: Sequence[ParameterGroup], weight_decay: float
) -> torch.optim.Optimizer:
    """Return the optimizer of these groups; each keeps its peak rate as "peak"."""
    if not groups:
        return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
    options: list[dict[str, Any]] = [
        {"params": list(g.parameters), "lr": g.learning_rate, "peak": g.learning_rate}
        for g in groups
    ]
    if name != ADAMW:
        return _of_bitsandbytes(name, options, weight_decay)
    return torch.optim.AdamW(options, weight_decay=weight_decay, fused=True)


def _of_bitsandbytes(
    name: str, options: list[dict[str, Any]], weight_decay: float
) -> torch.optim.Optimizer:
    with quiet_loggers(*QUANTIZERS):
        import bitsandbytes

        build = getattr(bitsandbytes.optim, _BITSANDBYTES[name])
        optimizer: torch.optim.Optimizer = build(options, weight_decay=weight_decay)
    return optimizer
