"""Keeps attention in fp32 where a processor's bf16 attention kernel is the slower one.

On CPUs without bf16 matrix units the backward pass of torch's fused bf16 attention takes several
times as long as the fp32 one: more than all matrix products of a small encoder together. Only a
measurement tells, so one is made, once a process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autopeft.training.precision import Precision, synchronise


@contextmanager
def training_attention(precision: Precision, device: str) -> Iterator[None]:
    """A context in which transformers' SDPA attention uses the faster precision for training.

    Only models that attend by SDPA are affected (nearly all do); the result differs by rounding,
    towards fp32. Uses transformers' own table of attention functions, and restores it.

    Args:
        precision: What the training computes in.
        device: Where.
    """
    if precision != "bf16" or not fp32_attention_is_faster(device):
        yield
        return
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def in_fp32(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """query, key, value: shape (b, heads, t, width of a head)."""
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        with torch.autocast(query.device.type, enabled=False):
            out, nothing = usual(
                module, query.float(), key.float(), value.float(), attention_mask, **options
            )
        return out.to(query.dtype), nothing

    ALL_ATTENTION_FUNCTIONS["sdpa"] = in_fp32
    try:
        yield
    finally:
        # The entry set above is local to the table; without it the library's own shows again.
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


@lru_cache(maxsize=8)
def fp32_attention_is_faster(device: str) -> bool:
    """True if attention, forward and back, costs less in fp32 than in bf16 on this device."""
    if torch.device(device).type == "cuda":
        return False  # The bf16 kernels are what the hardware is built for.
    return _attention_ms(torch.float32, device) < _attention_ms(torch.bfloat16, device)


def _attention_ms(dtype: torch.dtype, device: str) -> float:
    """Fastest of some passes, casts to and from bf16 included for fp32."""
    generator = torch.Generator().manual_seed(0)
    shape = (8, 8, 48, 32)  # (b, heads, t, width of a head): a usual batch of short texts
    query, key, value = (
        torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    mask = torch.ones(8, 1, 48, 48, dtype=torch.bool, device=device)
    seconds = []
    for _ in range(5):
        synchronise(device)
        started = time.perf_counter()
        out = functional.scaled_dot_product_attention(
            query.to(dtype), key.to(dtype), value.to(dtype), attn_mask=mask
        )
        out.to(torch.bfloat16).sum().backward()  # type: ignore[no-untyped-call]
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return 1000 * min(seconds)
