"""What autopeft's own tuners share: how peft gets to know them, and what they all do alike."""

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
    """Tells peft of a tuner.

    peft's own way takes only members of its enumeration `PeftType`, which cannot be added to. Its
    tables, though, are looked up by what equals such a member, and a plain string does.

    Args:
        kind: What `adapter_config.json` says as "peft_type".
        config: The configuration's class.
        tuner: The tuner's class.
    """
    tables: tuple[tuple[dict[Any, Any], Any], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, config),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner),
        (PEFT_TYPE_TO_PREFIX_MAPPING, tuner.prefix),
    )
    for table, entry in tables:
        table[kind] = entry


@dataclass
class TargetedConfig(PeftConfig):  # type: ignore[misc]
    """What every configuration here has.

    Attributes:
        r: Size of the adapter.
        rank_pattern: Module path (or a regular expression of its end) -> another size.
        target_modules: Paths or ends of paths of the modules to adapt, or one regular expression.
        exclude_modules: The same, of modules to leave out.
        modules_to_save: Modules trained and saved besides the adapters.
        init_weights: False starts from random values instead of from the base model's outputs.
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
        """The size of the adapter at a module's path."""
        return self.rank_pattern.get(get_pattern_key(self.rank_pattern, path), self.r)


class OwnLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A module wrapped, with adapters beside it that cannot be folded into its weights.

    Args:
        base_layer: What is wrapped.
        adapter_name: The adapter that is active at first.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []

    def add(self, adapter_name: str, size: int, config: Any) -> None:
        """Makes one more adapter."""
        raise NotImplementedError

    def start(self, adapter_name: str, size: int, config: Any) -> None:
        """Makes one more adapter, where the base module is, and sets which ones are trained."""
        if size < 1:
            raise ValueError(f"`r >= 1` must hold, but got r={size}")
        self.add(adapter_name, size, config)
        layer: Any = self  # peft's half of it
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """The adapters' parameters, and none of what is wrapped."""
        layer: Any = self  # peft's half of it
        for name in layer.adapter_layer_names:
            yield from getattr(layer, name).parameters()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Cannot be done.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{type(self).__name__} is no change of a weight: it cannot be merged"
        )

    def unmerge(self) -> None:
        """There is never anything merged."""


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
        """Only what is this tuner's own: what it wraps may hold layers of other tuners."""
        held: dict[str, torch.Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return {key: tensor for key, tensor in held.items() if f".{cls.prefix}" in f".{key}"}


class StandInLayer(OwnLayer):
    """A layer around a module that others look into: what it lacks itself it has from there.

    Args:
        base_layer: What is wrapped.
        adapter_name: The adapter that is active at first.
    """

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
            # Unloading: what was wrapped has no weight of its own, which peft would hand over.
            setattr(parent, child_name, new_module)
