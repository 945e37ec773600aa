"""Which models can have a prompt, and how many virtual tokens they have room for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from autopeft.costs import Shape

ROOM = 1024
"""Virtual tokens at most where positions have no end: nobody has found use for more."""

_TAKEN = frozenset({"input_ids", "inputs_embeds", "attention_mask"})


def prompt_site(model: nn.Module, blocks: Sequence[str]) -> tuple[str, Shape] | None:
    """Path of the model without its head, and the shape at the role "model"; None without one.

    It is the innermost module that holds all blocks and computes from embeddings: some heads
    (OPT's) call that themselves, past what is around it. An encoder-decoder has none: its decoder
    would need to be told of the longer rows.

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
        if all(each.startswith(f"{path}.") for each in blocks) and needs_embeddings(base):
            room = position_room(base)
            table: Any = base.get_input_embeddings()  # type: ignore[operator]
            return path, (ROOM if room is None else min(room, ROOM), int(table.embedding_dim))
    return None


def needs_embeddings(base: nn.Module) -> bool:
    """True if all that a model makes of its tokens' ids is a look into its input embeddings."""
    find = getattr(base, "get_input_embeddings", None)
    try:
        table = find() if callable(find) else None
    except NotImplementedError:
        table = None
    if not isinstance(table, nn.Embedding):
        return False
    # A further table of that length is one that ids look into, too (Gemma 3n's of each layer).
    others = [
        module
        for _, module in _tables(base)
        if module is not table and module.num_embeddings == table.num_embeddings
    ]
    return not others and set(inspect.signature(base.forward).parameters) >= _TAKEN


def position_room(base: nn.Module) -> int | None:
    """Tokens a row can have, where that is what a table of positions holds; None: any number."""
    rooms = []
    for path, module in _tables(base):
        name = path.rpartition(".")[2].lower()
        if name == "wpe" or ("position" in name and "relative" not in name):
            # RoBERTa counts from behind its padding token, OPT from its offset.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            rooms.append(module.num_embeddings - int(getattr(module, "offset", unused)))
    return min(rooms) if rooms else None


def _tables(base: nn.Module) -> Iterator[tuple[str, nn.Embedding]]:
    for path, module in base.named_modules():
        if isinstance(module, nn.Embedding):
            yield path, module
