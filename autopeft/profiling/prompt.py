"""What pricing needs to know of prompts: the room beside a row, and a model that has one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from autopeft.costs import Topology
from autopeft.models.attach import replace_module
from autopeft.models.method_hooks import ADAPTER_NAME
from autopeft.models.sites import position_room
from autopeft.models.topology import Layout
from autopeft.models.tuners import PromptConfig, PromptLayer
from autopeft.plan import MODEL


def topology_beside(model: nn.Module, layout: Layout, n_tokens: int) -> Topology:
    """The topology of a model whose longest row leaves so much less room for virtual tokens.

    Args:
        model: The model.
        layout: Its layout.
        n_tokens: Tokens of the longest row.
    """
    topology, site = layout.topology, layout.topology.shape(0, MODEL)
    if site is None:
        return topology
    (path,) = layout.modules[0, MODEL]
    room = position_room(model.get_submodule(path))
    if room is None:
        return topology
    left = (min(site[0], max(room - n_tokens, 0)), site[1])
    return replace(topology, shapes={**topology.shapes, MODEL: left})


@contextmanager
def prompted(model: nn.Module, layout: Layout, size: int) -> Iterator[tuple[nn.Parameter, ...]]:
    """A model with a frozen prompt in its rows, of no tokens perhaps.

    Yields:
        The prompt's parameters.
    """
    if not size:
        yield ()
        return
    (path,) = layout.modules[0, MODEL]
    base = model.get_submodule(path)
    layer = PromptLayer(base, ADAPTER_NAME)
    layer.start(ADAPTER_NAME, size, PromptConfig(r=size))
    prompt = tuple(layer.own_parameters())
    for parameter in prompt:
        parameter.requires_grad_(False)
    replace_module(model, path, layer.train(model.training))
    try:
        yield prompt
    finally:
        replace_module(model, path, base)
