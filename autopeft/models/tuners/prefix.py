"""Gated prefixes: trained keys and values for one self-attention.

Keys and values are trained directly, as in prefix tuning (Li and Liang, arXiv 2101.00190, without
its reparametrization). Queries attend to them in a separate softmax, and a gate for each head, 0 at
the start, scales the result, as in LLaMA-Adapter (arXiv 2303.16199). So the model starts unchanged,
no mask, position or key cache changes, and any attention kernel works.

Each query head has its own prefix, even where several heads share the keys of tokens.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface

from autopeft.models.sites import attention_shape
from autopeft.models.tuners.common import StandInLayer, StandInModel, TargetedConfig, register


@dataclass
class GatedPrefixConfig(TargetedConfig):
    """Configuration of a `GatedPrefixModel`; `r` is the number of prefix tokens.

    `target_modules` are modules that compute a self-attention, such as Llama's `self_attn`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "GATED_PREFIX"


class GatedPrefixLayer(StandInLayer):
    """A self-attention whose heads also attend to a prefix."""

    adapter_layer_names = ("gated_prefix_keys", "gated_prefix_values", "gated_prefix_gates")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        shape = attention_shape(base_layer)
        if shape is None:
            raise TypeError(
                f"{type(base_layer).__name__} cannot have a prefix: it does not look its attention "
                "function up in transformers' table, or does not say how many heads it has"
            )
        self._heads, self._head_size = shape[0], shape[1] // shape[0]
        self.gated_prefix_keys = nn.ParameterDict()
        self.gated_prefix_values = nn.ParameterDict()
        self.gated_prefix_gates = nn.ParameterDict()
        _listen()

    def add(self, adapter_name: str, size: int, config: GatedPrefixConfig) -> None:
        """Add an adapter."""
        shape = (self._heads, size, self._head_size)
        gates = torch.zeros(self._heads) if config.init_weights else torch.randn(self._heads)
        self.gated_prefix_keys[adapter_name] = nn.Parameter(torch.randn(shape))
        self.gated_prefix_values[adapter_name] = nn.Parameter(torch.randn(shape))
        self.gated_prefix_gates[adapter_name] = nn.Parameter(gates)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take and return what the attention does."""
        layer: Any = self  # peft's half of it
        if layer.disable_adapters:
            return self.base_layer(*args, **kwargs)
        call, around = _Call(self), _RUNNING.call
        _RUNNING.call = call
        try:
            result = self.base_layer(*args, **kwargs)
        finally:
            _RUNNING.call = around
        if not call.is_answered:
            raise RuntimeError(
                f"{type(self.base_layer).__name__} did not look its attention function up: "
                "its prefix was ignored"
            )
        return result

    def attended(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Return what the prefixes add: (b, heads, t, head size) -> (b, t, heads, head size)."""
        b, heads, t, size = query.shape
        # Batched over heads, not rows: no row needs a copy of the prefix.
        flat = query.transpose(0, 1).reshape(heads, b * t, size)
        total: torch.Tensor | None = None
        layer: Any = self  # peft's half of it
        for name in layer.active_adapters:
            if name in self.gated_prefix_keys:
                keys, values = self.gated_prefix_keys[name], self.gated_prefix_values[name]
                flat = flat.to(keys.dtype)
                shares = torch.softmax(flat @ keys.transpose(1, 2) * scaling, dim=-1)
                # Gating the values avoids keeping the heads' outputs for the gates' gradient.
                gates = torch.tanh(self.gated_prefix_gates[name])[:, None, None]
                part = shares @ (gates * values)  # (heads, b * t, size)
                total = part if total is None else total + part
        if total is None:
            return query.new_zeros(())
        return total.view(heads, b, t, size).permute(1, 2, 0, 3)


class GatedPrefixModel(StandInModel):
    """Puts a `GatedPrefixLayer` around each target self-attention."""

    prefix = "gated_prefix_"
    tuner_layer_cls = GatedPrefixLayer


class _Call:
    """One pass through a layer; it records that the attention looked its function up."""

    def __init__(self, layer: GatedPrefixLayer) -> None:
        self.layer = layer
        self.is_answered = False

    def attend(self, usual: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Attend to the tokens as usual, and to the prefix."""
        output, *rest = usual(*args, **kwargs)
        query: torch.Tensor = kwargs["query"] if "query" in kwargs else args[1]
        scaling = kwargs.get("scaling")
        added = self.layer.attended(query, query.shape[-1] ** -0.5 if scaling is None else scaling)
        self.is_answered = True
        return (output + added.to(output.dtype), *rest)


class _Running(threading.local):
    """The pass whose attention runs in this thread.

    No `ContextVar`: `torch.compile` cannot trace one, and `get_interface` is asked in every
    attention of this process.
    """

    def __init__(self) -> None:
        self.call: _Call | None = None


_RUNNING = _Running()


@functools.cache
def _listen() -> None:
    """Patch transformers' table of attention functions to consult `_RUNNING`, once.

    Attentions of transformers look their function (eager, SDPA, flash, ...) up there at every pass.
    Registering a function would need another configuration in each adapted module; this leaves the
    base model unchanged and has no effect outside an attention with a prefix. No upstream issue
    known.
    """
    usual = AttentionInterface.get_interface

    @functools.wraps(usual)
    def get_interface(table: AttentionInterface, *args: Any, **kwargs: Any) -> Any:
        function = usual(table, *args, **kwargs)
        call = _RUNNING.call
        return function if call is None else functools.partial(call.attend, function)

    AttentionInterface.get_interface = get_interface


register("GATED_PREFIX", GatedPrefixConfig, GatedPrefixModel)
