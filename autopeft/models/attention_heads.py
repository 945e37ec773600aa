"""What a self-attention of transformers tells of its heads."""

from __future__ import annotations

import inspect

from torch import nn

_HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "num_attn_heads", "n_head")


def attention_shape(attention: nn.Module) -> tuple[int, int] | None:
    """(heads, their width together) of a self-attention of transformers.

    None where a prefix cannot work: the module does not look its attention function up in
    transformers' table, or does not tell its heads.
    """
    forward = inspect.unwrap(type(attention).forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    if not {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= set(names):
        return None
    places = (attention, getattr(attention, "config", None))
    heads, size = (
        next((n for p in places for k in keys if isinstance(n := getattr(p, k, None), int)), 0)
        for keys in (_HEADS, _HEAD_SIZES)
    )
    return (heads, heads * size) if heads and size else None
