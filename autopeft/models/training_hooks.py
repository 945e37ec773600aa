"""What some methods do while they are trained, besides having gradients."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from autopeft.models.method_hooks import ADAPTER_NAME


class Companion(Protocol):
    """Accompanies the training of one part."""

    def penalty(self) -> torch.Tensor:
        """What the part adds to the loss, a scalar."""

    def after_update(self, step: int) -> None:
        """Called after each optimizer step, counted from 1, while the gradients are still there."""


def companion_of(method: str, tuner: Any) -> Companion | None:
    """The companion of a part, None where it needs none.

    Args:
        method: The part's method.
        tuner: peft's tuner of the part.
    """
    return RankAllocation(tuner) if method == "adalora" else None


class RankAllocation:
    """AdaLoRA's (arXiv 2303.10512): drops what matters least, keeps the rest orthogonal.

    Args:
        tuner: An `AdaLoraModel`; its configuration holds the schedule.
    """

    def __init__(self, tuner: Any) -> None:
        self._tuner = tuner
        self._config = tuner.peft_config[ADAPTER_NAME]
        self._kept: dict[str, list[bool]] | None = None

    def penalty(self) -> torch.Tensor:
        """Distance of A A^T and B^T B from the identity, their mean over all modules, weighted.

        peft adds the same in the forward pass of a whole model, which a part is not.
        """
        distances = []
        for name, parameter in self._tuner.model.named_parameters():
            if f"lora_A.{ADAPTER_NAME}" in name:
                product = parameter @ parameter.T  # (rank, rank)
            elif f"lora_B.{ADAPTER_NAME}" in name:
                product = parameter.T @ parameter  # (rank, rank)
            else:
                continue
            distances.append(torch.linalg.norm(product - torch.eye(*product.shape).to(product)))
        return torch.stack(distances).mean() * float(self._config.orth_reg_weight)

    def after_update(self, step: int) -> None:
        """Weighs all triplets and drops what the schedule says; those of the end stay dropped."""
        # peft would cut the dropped ones out when saving, by names that a part's tensors have not:
        # it may know of them in here only.
        self._config.rank_pattern = self._kept
        try:
            self._tuner.update_and_allocate(step)
        finally:
            self._kept, self._config.rank_pattern = self._config.rank_pattern, None
