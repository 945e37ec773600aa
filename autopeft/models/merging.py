"""Merge adapters into their base modules for the duration of a context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from autopeft.models.attach import Attached, wrappers
from autopeft.models.modules import LinearView, own_parameters, replace_module


@contextmanager
def merged(attached: Attached, paths: frozenset[str] | None = None) -> Iterator[Mapping[str, Any]]:
    """Merge an attached candidate into plain modules; undo it afterwards, bit for bit.

    Args:
        attached: The candidate; its methods at those paths must be mergeable.
        paths: The modules to merge; default: all adapted ones.

    Yields:
        Module path -> the values its parameters had before, by name.
    """
    model = attached.model
    layers: dict[str, Any] = {
        path: layer
        for part in attached.parts
        for path, layer in part.layers.items()
        if paths is None or path in paths
    }
    undo: dict[str, list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]]] = {}
    before: dict[str, dict[str, torch.Tensor]] = {}
    try:
        for path, layer in layers.items():
            original = attached.originals[path]
            # Methods that rewrite the weight have their own copy of the module.
            both = (*own_parameters(original), *own_parameters(layer.get_base_layer()))
            undo[path] = [(p, p.data, p.data.clone()) for p in {id(p): p for p in both}.values()]
            values = {id(p): value for p, _, value in undo[path]}
            before[path] = {
                name: values[id(p)] for name, p in original.named_parameters(recurse=False)
            }
            replace_module(model, path, _merge(layer, original))
        yield before
    finally:
        for path, layer in layers.items():
            if path in undo:
                _unmerge(layer)
                for parameter, data, values_before in undo[path]:
                    parameter.data = data.copy_(values_before)
            replace_module(model, path, layer)


def _merge(layer: Any, original: nn.Module) -> nn.Module:
    """Merge a layer's adapter into its base module; return the module to put in its place."""
    assert isinstance(layer, BaseTunerLayer)
    for own in wrappers(layer) or [layer]:
        own.merge(safe_merge=True)
    merged_base: nn.Module = layer.get_base_layer()
    if isinstance(merged_base, LinearView):
        for name, parameter in original.named_parameters(recurse=False):
            data = getattr(merged_base, name).data
            parameter.data = (data.t() if name == "weight" else data).contiguous()
        return original
    return merged_base


def _unmerge(layer: Any) -> None:
    """Mark a layer's adapter as not merged, without touching its base module's values."""
    if isinstance(layer, LNTuningLayer):
        layer.unmerge()  # Only swaps two modules.
    for own in wrappers(layer) or [layer]:
        own.merged_adapters.clear()


@contextmanager
def cast(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Give a model's floating-point parameters another type; undo it afterwards, bit for bit."""
    before = [(p, p.data) for p in model.parameters() if p.is_floating_point()]
    config: Any = model.config
    config_dtype = config.dtype
    try:
        for parameter, data in before:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
        config.dtype = config_dtype
