"""The last layer of a new head in the unit of what it predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autopeft.models.loading import auto_loader
from autopeft.utils.quiet import quiet_transformers


def has_output_bias(config: Any, auto_class: str) -> bool:
    """Return whether the head of a class of transformers ends in a layer with a bias.

    Args:
        config: The model's configuration, from transformers.
        auto_class: Name of the class that loads it.
    """
    with quiet_transformers(), torch.device("meta"):
        model = auto_loader(auto_class).from_config(config, trust_remote_code=False)
    layer = _last_layer(model, dict(model.named_modules()))
    return layer is not None and model.get_submodule(layer).bias is not None


def in_unit(
    model: nn.Module, head: Mapping[str, torch.Tensor], shift: float, factor: float
) -> dict[str, torch.Tensor]:
    """Return a head's tensors so that its output y becomes shift + factor * y.

    Args:
        model: The model.
        head: Name in the model -> tensor of its new head.
        shift: What is added; must be 0 if the last layer has no bias.
        factor: What its output is multiplied with.
    """
    path = _last_layer(model, {name.rpartition(".")[0]: None for name in head})
    assert path is not None, "a new head ends in a linear layer"
    scaled = dict(head)
    scaled[f"{path}.weight"] = head[f"{path}.weight"].detach() * factor
    if f"{path}.bias" in head:
        scaled[f"{path}.bias"] = head[f"{path}.bias"].detach() * factor + shift
    else:
        assert shift == 0.0, "without a bias nothing can be added"
    return scaled


def _last_layer(model: nn.Module, among: Mapping[str, Any]) -> str | None:
    """Return the path of the last linear layer with as many outputs as the model has."""
    config: Any = model.config
    found = None
    for path, module in model.named_modules():
        if path in among and isinstance(module, nn.Linear):
            found = path if module.out_features == config.num_labels else found
    return found
