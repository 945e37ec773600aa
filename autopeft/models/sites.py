"""Which self-attentions can have a prefix, and which models a prompt of how many virtual tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from autopeft.costs import Shape

MAX_VIRTUAL_TOKENS = 1024
"""Limit where the model itself has none; longer prompts have no known use."""

_PROMPT_ARGUMENTS = frozenset({"input_ids", "inputs_embeds", "attention_mask"})
_HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "num_attn_heads", "n_head")


def attention_shape(attention: nn.Module) -> tuple[int, int] | None:
    """Return (heads, total width of the heads) of a self-attention of transformers.

    Return None where a prefix cannot work: the module does not look its attention function up in
    transformers' table, or does not say how many heads it has.
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


def prompt_site(model: nn.Module, blocks: Sequence[str]) -> tuple[str, Shape] | None:
    """Return the path of the model without its head and its shape at the role "model", or None.

    This is the innermost module that holds all blocks and can start from embeddings: some heads
    (OPT's) call that one directly. Encoder-decoders have none, because their decoder would
    need to know about the longer rows.

    Args:
        model: Any transformer.
        blocks: Paths of its blocks.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return None
    path = blocks[0]
    while path := path.rpartition(".")[0]:
        base = model.get_submodule(path)
        if all(each.startswith(f"{path}.") for each in blocks) and can_start_from_embeddings(base):
            positions = max_positions(base)
            limit = MAX_VIRTUAL_TOKENS if positions is None else min(positions, MAX_VIRTUAL_TOKENS)
            table: Any = base.get_input_embeddings()  # type: ignore[operator]
            return path, (limit, int(table.embedding_dim))
    return None


def can_start_from_embeddings(base: nn.Module) -> bool:
    """Return whether a model uses token ids only to look up its input embeddings."""
    find = getattr(base, "get_input_embeddings", None)
    try:
        table = find() if callable(find) else None
    except NotImplementedError:
        table = None
    if not isinstance(table, nn.Embedding):
        return False
    # Another table of that length is indexed by ids as well (Gemma 3n has one for each layer).
    others = [
        module
        for _, module in _embeddings(base)
        if module is not table and module.num_embeddings == table.num_embeddings
    ]
    return not others and set(inspect.signature(base.forward).parameters) >= _PROMPT_ARGUMENTS


def max_positions(base: nn.Module) -> int | None:
    """Return the longest row that fits the model's table of positions; None without a table."""
    limits = []
    for path, module in _embeddings(base):
        name = path.rpartition(".")[2].lower()
        if name == "wpe" or ("position" in name and "relative" not in name):
            # RoBERTa counts from after its padding token, OPT from its offset.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - int(getattr(module, "offset", unused)))
    return min(limits) if limits else None


def reads_backwards_only(base: nn.Module) -> bool:
    """Whether tokens attend to earlier ones alone, as a decoder's do."""
    return any(getattr(module, "is_causal", False) is True for module in base.modules())


def _embeddings(base: nn.Module) -> Iterator[tuple[str, nn.Embedding]]:
    for path, module in base.named_modules():
        if isinstance(module, nn.Embedding):
            yield path, module
