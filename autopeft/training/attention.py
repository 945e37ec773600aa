"""Computes attention in training by whatever is fastest here: measured, not assumed.

On CPUs without bf16 matrix units the backward pass of torch's fused bf16 attention takes several
times as long as the fp32 one: more than all matrix products of a small encoder together. For short
rows the plain formula, products in bf16 and the softmax in fp32, is faster than either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autopeft.training.precision import Precision, synchronize

AttentionFunction = Callable[..., tuple[torch.Tensor, Any]]
"""As in transformers: (module, query, key, value, attention_mask, **options) -> (output, weights).

query, key, value: shape (b, heads, t, width of a head), with fewer heads in key and value where
several share them; output: shape (b, t, heads, width of a head).
"""

Kernel = Literal["fused", "fused fp32", "plain"]

PLAIN_LENGTH = 256
"""Longest rows for the plain formula, which keeps every pair of tokens for the backward pass."""


def training_attention(precision: Precision, device: str) -> AbstractContextManager[None]:
    """A context in which transformers' SDPA attention uses what is fastest for training.

    Only models that attend by SDPA are affected (nearly all do); the result differs by rounding.

    Args:
        precision: What the training computes in.
        device: Where.
    """
    if precision != "bf16" or torch.device(device).type == "cuda":
        return nullcontext()  # GPUs' fused kernels are what the hardware is built for.
    return attention_through(partial(_by_measurement, device))


@contextmanager
def attention_through(
    around: Callable[[AttentionFunction], AttentionFunction],
) -> Iterator[None]:
    """A context in which SDPA attention is computed by a function around the one so far.

    Uses transformers' own table of attention functions, and restores it. May be nested.
    """
    table = ALL_ATTENTION_FUNCTIONS
    before = table["sdpa"]
    own = table._local_mapping.get("sdpa")
    table["sdpa"] = around(before)
    try:
        yield
    finally:
        if own is None:
            # Local to the table; without it the library's own shows again.
            del table["sdpa"]
        else:
            table["sdpa"] = own


def _by_measurement(device: str, usual: AttentionFunction) -> AttentionFunction:
    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, Any]:
        length = 1 << (key.shape[2] - 1).bit_length()
        kernel = fastest_kernel(device, min(length, 2 * PLAIN_LENGTH), query.shape[-1])
        if kernel == "plain" and not _needs_fused(options):
            return plain_attention(module, query, key, value, attention_mask, **options)
        if kernel == "fused":
            return usual(module, query, key, value, attention_mask, **options)
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        with torch.autocast(query.device.type, enabled=False):
            out, rest = usual(
                module, query.float(), key.float(), value.float(), attention_mask, **options
            )
        return out.to(query.dtype), rest

    return attend


def _needs_fused(options: dict[str, Any]) -> bool:
    """Whether transformers' function is asked for something the plain formula here lacks."""
    return bool(options.get("dropout")) or options.get("position_bias") is not None


def plain_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_options: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(q k' * scaling + mask) v, the softmax in fp32, with transformers' conventions.

    Args:
        module: The attention; says whether it is causal where nothing else does.
        query: Shape (b, heads, t, width of a head).
        key: Shape (b, key heads, keys, width of a head).
        value: Like `key`.
        attention_mask: Boolean (True: attend) or additive, broadcastable to (b, heads, t, keys).
        scaling: Of the scores; default 1 / sqrt(width of a head).
        is_causal: Whether to attend backwards only where there is no mask.

    Returns:
        Shape (b, t, heads, width of a head), and None.
    """
    b, heads, t, width = query.shape
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and t > 1:
            attention_mask = query.new_ones(t, key.shape[2], dtype=torch.bool).tril()
    scale = width**-0.5 if scaling is None else scaling
    products = (query.flatten(0, 1), key.flatten(0, 1).mT)
    if attention_mask is None:
        scores = torch.bmm(*products) * scale
    else:
        bias = _additive(attention_mask, query.dtype).expand(b, heads, t, -1)
        scores = torch.baddbmm(bias.flatten(0, 1), *products, alpha=scale)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    output = torch.bmm(weights, value.flatten(0, 1))  # (b * heads, t, width)
    return output.view(b, heads, t, -1).transpose(1, 2).contiguous(), None


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask to add to scores, shape (b or 1, heads or 1, t or 1, keys).

    Its least value is finite: a row that attends to nothing must not become NaN.
    """
    least = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return zeros.masked_fill_(~mask, least)
    return mask.clamp(min=least).to(dtype)


@lru_cache(maxsize=64)
def fastest_kernel(device: str, length: int, width: int) -> Kernel:
    """What computes bf16 attention fastest, forward and back, on this device; measured once.

    Args:
        device: Where.
        length: Tokens of a row.
        width: Of a head.
    """
    kernels: tuple[Kernel, ...] = ("fused", "fused fp32", "plain")
    if length > PLAIN_LENGTH:
        kernels = ("fused", "fused fp32")
    # A first batch may be looked at without gradients; what is measured is a training's.
    with torch.inference_mode(False), torch.enable_grad():
        return min(kernels, key=lambda kernel: _attention_ms(kernel, device, length, width))


def _attention_ms(kernel: Kernel, device: str, length: int, width: int) -> float:
    """Fastest of some passes, casts to and from bf16 included for fp32."""
    generator = torch.Generator().manual_seed(0)
    rows = max(1, 512 // length)
    shape = (rows, 8, length, width)  # (b, heads, t, width of a head)
    query, key, value = (
        torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device=device)
    nothing = torch.nn.Module()
    seconds = []
    for _ in range(4):
        synchronize(device)
        started = time.perf_counter()
        if kernel == "plain":
            out = plain_attention(nothing, query, key, value, mask)[0]
        else:
            dtype = torch.float32 if kernel == "fused fp32" else torch.bfloat16
            out = functional.scaled_dot_product_attention(
                query.to(dtype), key.to(dtype), value.to(dtype), attn_mask=mask
            )
        out.to(torch.bfloat16).sum().backward()  # type: ignore[no-untyped-call]
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 1000 * min(seconds)
