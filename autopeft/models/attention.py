"""Which implementation of attention a model uses."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from autopeft.errors import SettingsError
from autopeft.utils.device import is_accelerator, is_here

AUTO = "auto"

_FLASH = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
"""Name in transformers -> the module it needs, and its package."""


def check_attention(name: str, model: Any, device: str, precision: str) -> None:
    """Check that a model has an implementation of attention, and this machine too.

    Args:
        name: A value of the setting `attn_implementation`.
        model: A model of transformers, perhaps without weights.
        device: As torch names it; packages of one that this machine lacks are not looked for.
        precision: Precision of the trainings; "auto": still to be chosen.

    Raises:
        SettingsError: if it lacks it.
    """

    def refuse(problem: str, remedy: str = "leave it out") -> SettingsError:
        return SettingsError("attn_implementation", name, problem, remedy)

    kind = "flash_attn" if name in _FLASH else name
    if name != AUTO and not getattr(model, f"_supports_{kind}", name == "eager"):
        raise refuse(f"{type(model).__name__} does not have it")
    if name not in _FLASH:
        return
    module, package = _FLASH[name]
    if not is_accelerator(device):
        raise refuse(f"does not run on {device}", "use sdpa")
    if precision == "fp32":
        raise refuse("computes in 16 bits only", "use precision=bf16, or sdpa")
    if is_here(device) and importlib.util.find_spec(module) is None:
        raise refuse(f"{package} is not installed", f"use sdpa, or run: pip install {package}")


def use_attention(name: str, model: Any) -> None:
    """Let a model of transformers use an implementation; "auto": transformers' own choice."""
    if name != AUTO:
        model.set_attn_implementation(name)


@contextmanager
def attention_in(precision: str, model: Any) -> Iterator[None]:
    """Use SDPA attention in this context where FlashAttention cannot compute in fp32."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if precision != "fp32" or name not in _FLASH:
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(name)
