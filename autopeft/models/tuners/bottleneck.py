"""Bottleneck adapters: a small two-layer network after a module or beside it.

Sources: serial, after attention and feed-forward, Houlsby et al. (arXiv 1902.00751); serial, after
the feed-forward only, Pfeiffer et al. (arXiv 2005.00247); parallel, He et al. (arXiv 2110.04366).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn
from torch.nn import functional

from autopeft.models.tuners.common import OwnLayer, OwnModel, TargetedConfig, register

NON_LINEARITIES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}
"""Functions between the two projections."""


@dataclass
class BottleneckConfig(TargetedConfig):
    """Configuration of a `BottleneckModel`.

    Attributes:
        parallel: True feeds the module's input to the bottleneck, False its output.
        scaling: Factor of the bottleneck's output.
        bottleneck_dropout: Dropout of the bottleneck's inner values.
        non_linearity: One of `NON_LINEARITIES`.
    """

    parallel: bool = field(default=False)
    scaling: float = field(default=1.0)
    bottleneck_dropout: float = field(default=0.0)
    non_linearity: str = field(default="relu")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "BOTTLENECK"
        if self.non_linearity not in NON_LINEARITIES:
            raise ValueError(
                f"no such non_linearity: {self.non_linearity!r}; use one of "
                f"{', '.join(NON_LINEARITIES)}"
            )


class BottleneckLayer(OwnLayer):
    """A linear module h = W x and h + s U f(D h) after it, or h + s U f(D x) beside it."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout", "bottleneck_scaling")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.bottleneck_scaling: dict[str, float] = {}
        self._is_parallel: dict[str, bool] = {}
        self._non_linearity: dict[str, str] = {}

    def add(self, adapter_name: str, size: int, config: BottleneckConfig) -> None:
        """Add an adapter."""
        in_, out = _get_in_out_features(self.base_layer)
        if in_ is None or out is None:
            raise TypeError(f"a bottleneck needs a linear module, not {type(self.base_layer)}")
        down = nn.Linear(in_ if config.parallel else out, size)
        up = nn.Linear(size, out)
        # As He et al.: torch's initialization for D, its bias 0; U 0, so that nothing is added.
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(down.bias)
        if config.init_weights:
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
        self.bottleneck_down[adapter_name] = down
        self.bottleneck_up[adapter_name] = up
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.bottleneck_dropout)
        self.bottleneck_scaling[adapter_name] = config.scaling
        self._is_parallel[adapter_name] = config.parallel
        self._non_linearity[adapter_name] = config.non_linearity

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        layer: Any = self  # peft's half of it
        if layer.disable_adapters:
            return result
        for name in layer.active_adapters:
            if name in self.bottleneck_down:
                source = x if self._is_parallel[name] else result
                result = result + self._update(name, source).to(result.dtype)
        return result

    def _update(self, name: str, source: torch.Tensor) -> torch.Tensor:
        down: Any = self.bottleneck_down[name]
        up: Any = self.bottleneck_up[name]
        dropout: Any = self.bottleneck_dropout[name]
        inner = down(source.to(down.weight.dtype))  # (..., r)
        inner = NON_LINEARITIES[self._non_linearity[name]](inner)
        if dropout.p > 0.0:
            inner = dropout(inner)
        update: torch.Tensor = up(inner)
        scaling = self.bottleneck_scaling[name]
        return update if scaling == 1.0 else update * scaling


class BottleneckModel(OwnModel):
    """Replaces each target module by a `BottleneckLayer`."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer


register("BOTTLENECK", BottleneckConfig, BottleneckModel)
