"""The base classes of autopeft's own tuners, and their registration with peft."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn


def register(kind: str, config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Register a tuner with peft.

    peft's `register_peft_method` takes members of the enumeration `PeftType` only, which cannot be
    extended. Its tables also accept plain strings as keys, the "peft_type" in
    `adapter_config.json`. No upstream issue known.
    """
    key: Any = kind
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = config
    PEFT_TYPE_TO_TUNER_MAPPING[key] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = tuner.prefix


@dataclass
class TargetedConfig(PeftConfig):  # type: ignore[misc]
    """The common part of all configurations here.

    Attributes:
        r: Size of the adapter.
        rank_pattern: Module path (or a regular expression of its end) -> another size.
        target_modules: Paths or ends of paths of the modules to adapt, or one regular expression.
        exclude_modules: The same, of modules to leave out.
        modules_to_save: Modules trained and saved besides the adapters.
        init_weights: False starts from random values, True from the base model's outputs.
    """

    r: int = field(default=8)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    target_modules: list[str] | set[str] | str | None = field(default=None)
    exclude_modules: list[str] | set[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    init_weights: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    def size_at(self, path: str) -> int:
        """Return the size of the adapter at a module's path."""
        return self.rank_pattern.get(get_pattern_key(self.rank_pattern, path), self.r)


class OwnLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A wrapped module with adapters that cannot be merged into its weights."""

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []

    def add(self, adapter_name: str, size: int, config: Any) -> None:
        """Add an adapter."""
        raise NotImplementedError

    def start(self, adapter_name: str, size: int, config: Any) -> None:
        """Add an adapter on the base module's device, and set which ones are trained."""
        if size < 1:
            raise ValueError(f"`r >= 1` must hold, but got r={size}")
        self.add(adapter_name, size, config)
        layer: Any = self  # peft's half of it
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the adapters' parameters, without those of the wrapped module."""
        layer: Any = self  # peft's half of it
        for name in layer.adapter_layer_names:
            yield from getattr(layer, name).parameters()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise an error: such an adapter cannot be merged."""
        raise NotImplementedError(
            f"{type(self).__name__} does not change a weight: it cannot be merged"
        )

    def unmerge(self) -> None:
        """Do nothing: nothing is ever merged."""


class OwnModel(BaseTuner):  # type: ignore[misc]
    """A tuner whose layers are `OwnLayer`s."""

    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (peft declares it so)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        size = peft_config.size_at(current_key)
        if isinstance(target, self.tuner_layer_cls):
            target.start(adapter_name, size, peft_config)
            return
        layer = self.tuner_layer_cls(target, adapter_name)
        layer.start(adapter_name, size, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """Return this tuner's own tensors; the wrapped module may contain other tuners' layers."""
        held: dict[str, torch.Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return {key: tensor for key, tensor in held.items() if f".{cls.prefix}" in f".{key}"}


class StandInLayer(OwnLayer):
    """A layer around a module that other code reads: it passes attributes through."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)


class StandInModel(OwnModel):
    """A tuner whose layers are `StandInLayer`s."""

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        if isinstance(new_module, StandInLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            # Unloading: peft would copy the weight, and the wrapped module has none of its own.
            setattr(parent, child_name, new_module)
