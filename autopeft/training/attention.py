"""Computes attention in training with the kernel that a measurement finds fastest.

On CPUs without bf16 matrix units the backward pass of torch's fused bf16 attention takes several
times as long as the fp32 one: more than all matrix products of a small encoder together. For short
rows the plain formula, with products in bf16 and the softmax in fp32, is faster than either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autopeft.tasks.batch import Batch
from autopeft.training.acceleration import TOLERANCE, verified
from autopeft.training.precision import Precision, seconds_of
from autopeft.utils.device import is_accelerator

AttentionFunction = Callable[..., tuple[torch.Tensor, Any]]
"""As in transformers: (module, query, key, value, attention_mask, **options) -> (output, weights).

query, key, value: shape (b, heads, t, width of a head), with fewer heads in key and value where
several share them; output: shape (b, t, heads, width of a head).
"""

Kernel = Literal["fused", "fused fp32", "plain"]

PLAIN_LENGTH = 256
"""Longest rows for the plain formula, which keeps every pair of tokens for the backward pass."""

_IS_VERIFIED: dict[tuple[Kernel, type[torch.nn.Module]], bool] = {}
"""Kernel and class of an attention -> whether its first result was the usual one."""


def training_attention(precision: Precision, device: str) -> AbstractContextManager[None]:
    """Return a context in which transformers' SDPA attention uses the fastest training kernel.

    Affects models with SDPA attention (nearly all); results differ by rounding only.
    """
    if precision != "bf16" or is_accelerator(device):
        return nullcontext()  # There the fused kernels are the fastest.
    return attention_through(partial(_by_measurement, device))


@contextmanager
def attention_through(around: Callable[[AttentionFunction], AttentionFunction]) -> Iterator[None]:
    """Replace SDPA attention by a function around the current one within this context.

    Changes transformers' table of attention functions and restores it. Contexts can be nested.
    """
    table = ALL_ATTENTION_FUNCTIONS
    usual: AttentionFunction = table["sdpa"]
    own = table._local_mapping.get("sdpa")
    changed = around(usual)

    def attend(*arguments: Any, **options: Any) -> tuple[torch.Tensor, Any]:
        # A compiled block keeps its own attention: it cannot choose one at each call.
        if torch.compiler.is_compiling():
            return usual(*arguments, **options)
        return changed(*arguments, **options)

    table["sdpa"] = attend
    try:
        yield
    finally:
        if own is None:
            # Without this local entry the table finds the library's own function again.
            del table["sdpa"]
        else:
            table["sdpa"] = own


@contextmanager
def known_padding(batch: Batch, device: str) -> Iterator[None]:
    """Let transformers know in this context whether a batch is padded, without asking its device.

    Before each pass it asks the attention mask whether all of it is ones, to leave it out; on an
    accelerator the host waits for the answer (huggingface/transformers has no switch for it).
    """
    mask = batch.arrays.get("attention_mask")
    # A decoder's own mask may have the shape of its encoder's.
    if mask is None or "decoder_input_ids" in batch.tensors or not is_accelerator(device):
        yield
        return
    with ExitStack() as stack:
        for name in ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa"):
            own = getattr(masking_utils, name, None)
            if own is not None:
                stack.callback(setattr, masking_utils, name, own)
                setattr(masking_utils, name, partial(_can_leave_out, own, mask))
        yield


def _can_leave_out(
    own: Callable[..., bool],
    known: NDArray[Any],
    padding_mask: torch.Tensor | None,
    *shape: Any,
    **options: Any,
) -> bool:
    """Return whether a mask can be left out: never with padding, else as transformers says."""
    if padding_mask is not None and padding_mask.shape == known.shape:
        if not known.all():
            return False
        padding_mask = None
    return own(padding_mask, *shape, **options)


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
        has_dropout = bool(options.get("dropout"))
        if kernel == "plain" and (has_dropout or options.get("position_bias") is not None):
            kernel = "fused fp32"  # The plain formula lacks both.
        arguments = (module, query, key, value, attention_mask)
        case = (kernel, type(module))
        if kernel == "fused" or not _IS_VERIFIED.get(case, True):
            return usual(*arguments, **options)
        function = plain_attention if kernel == "plain" else partial(_fp32_attention, usual)
        output, rest = function(*arguments, **options)
        if case not in _IS_VERIFIED and not has_dropout:
            with torch.no_grad():
                expected = usual(*arguments, **options)[0]
            attends = _attends(attention_mask, query)
            _IS_VERIFIED[case] = verified(
                output.detach()[attends],
                expected[attends],
                TOLERANCE["bf16"],
                what=f"{kernel} attention in {type(module).__name__}",
            )
        return output, rest

    return attend


def _attends(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
    """Return which queries attend to any key, shape (b, t, heads); other results are undefined."""
    if mask is None:
        attends = query.new_ones((), dtype=torch.bool)
    elif mask.dtype == torch.bool:
        attends = mask.any(dim=-1)
    else:
        attends = (mask > torch.finfo(mask.dtype).min / 2).any(dim=-1)
    return attends.expand(query.shape[:3]).transpose(1, 2)


def _fp32_attention(
    usual: AttentionFunction,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, Any]:
    """Compute the usual attention in fp32, with masks and biases (T5's) in fp32 too."""
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    if options.get("position_bias") is not None:
        options["position_bias"] = options["position_bias"].float()
    with torch.autocast(query.device.type, enabled=False):
        output, rest = usual(
            module, query.float(), key.float(), value.float(), attention_mask, **options
        )
    return output.to(query.dtype), rest


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
    """Return softmax(q k' * scaling + mask) v, the softmax in fp32, as transformers defines it.

    Args:
        module: The attention; its `is_causal` is the default of the argument.
        query: Shape (b, heads, t, width of a head).
        key: Shape (b, key heads, keys, width of a head).
        value: Like `key`.
        attention_mask: Boolean (True: attend) or additive, broadcastable to (b, heads, t, keys).
        scaling: Factor of the scores; by default 1 / sqrt(width of a head).
        is_causal: Whether tokens attend backwards only; ignored if there is a mask.

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
    """Return a mask to add to scores, shape (b or 1, heads or 1, t or 1, keys).

    Its lowest value is finite, so that a row that attends to nothing does not become NaN.
    """
    least = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return zeros.masked_fill_(~mask, least)
    return mask.clamp(min=least).to(dtype)


@lru_cache(maxsize=64)
def fastest_kernel(device: str, length: int, width: int) -> Kernel:
    """Return the kernel that computes bf16 attention fastest, forward and back; measured once.

    `length` is the number of tokens in a row, `width` that of a head.
    """
    kernels: tuple[Kernel, ...] = ("fused", "fused fp32", "plain")
    if length > PLAIN_LENGTH:
        kernels = ("fused", "fused fp32")
    # The caller may have gradients off; a training's passes are measured in any case.
    with torch.inference_mode(False), torch.enable_grad():
        return min(kernels, key=lambda kernel: _attention_ms(kernel, device, length, width))


def _attention_ms(kernel: Kernel, device: str, length: int, width: int) -> float:
    """Return the shortest of some passes; for fp32, casts from and to bf16 are included."""
    generator = torch.Generator().manual_seed(0)
    rows = max(1, 512 // length)
    shape = (rows, 8, length, width)  # (b, heads, t, width of a head)
    query, key, value = (
        torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device=device)
    nothing = torch.nn.Module()

    def run() -> None:
        if kernel == "plain":
            out = plain_attention(nothing, query, key, value, mask)[0]
        else:
            dtype = torch.float32 if kernel == "fused fp32" else torch.bfloat16
            out = functional.scaled_dot_product_attention(
                query.to(dtype), key.to(dtype), value.to(dtype), attn_mask=mask
            )
        out.to(torch.bfloat16).sum().backward()  # type: ignore[no-untyped-call]

    return 1000 * min(seconds_of(run, device) for _ in range(4))
