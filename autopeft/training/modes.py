"""Which parts of a model behave as in training: the adapters, never the frozen base."""

from __future__ import annotations

import torch


def train_adapters_only(model: torch.nn.Module) -> None:
    """Sets dropout active inside adapters and off everywhere else.

    The base is frozen, so its dropout would only add noise to what the adapters see; without it,
    the hidden states below the lowest adapter are the same in every epoch, in training and in
    evaluation, and can be computed once (`prefix_cache`).

    An adapter is a module that wraps another one as `base_layer`, or one that is marked by an
    attribute `is_autopeft_adapter`.
    """
    model.eval()
    for module in model.modules():
        if hasattr(module, "base_layer"):
            # The wrapper's own flag counts: DoRA looks at it to decide what to drop.
            module.training = True
            for name, child in module.named_children():
                if name != "base_layer":
                    child.train()
        elif getattr(module, "is_autopeft_adapter", False):
            module.train()
