"""Single modules: put one in another's place, and see a Conv1D as a linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place that a path names."""
    parent_path, _, name = path.rpartition(".")
    parent: Any = model.get_submodule(parent_path)
    while name not in parent._modules:
        # An adapted attention shows the modules of the one that it wraps.
        parent = parent.base_layer
    parent._modules[name] = module


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module without those of its children."""
    return list(module.parameters(recurse=False))


class LinearView(nn.Linear):
    """A Conv1D as the linear layer it is: same storage, same arithmetic to the last bit.

    Some of peft's methods know Conv1D, whose weight has shape (in, out), only in part (LoRA copies
    the weight for DoRA) or not at all (OFT, MiSS); all of them know linear layers.
    """

    def __init__(self, conv: Conv1D) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = conv.weight.shape
        self.weight = nn.Parameter(conv.weight.detach().t(), requires_grad=False)
        self.bias = conv.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        flat = torch.addmm(self.bias, input.view(-1, self.in_features), self.weight.t())
        return flat.view(*input.shape[:-1], self.out_features)
