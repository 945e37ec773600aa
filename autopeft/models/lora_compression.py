"""Lower ranks of a trained LoRA, by truncated singular value decomposition, without training.

A LoRA trained at a high rank and cut to a lower one often scores better than one trained at the
lower rank: a cheap source of further points for a front.
"""

from __future__ import annotations

from typing import Any

import torch

from autopeft.models.attach import Attached
from autopeft.models.method_hooks import ADAPTER_NAME


class Trained:
    """What was trained, copied, so that it can be cut to any rank after it was detached.

    Args:
        attached: A plan of ordinary LoRA layers only.
    """

    def __init__(self, attached: Attached) -> None:
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for part in attached.parts:
            for path, layer in part.layers.items():
                self._factors[path] = lora_factors(layer)
        self._head = [p.detach().clone() for p in attached.head_parameters()]

    @torch.no_grad()
    def cut_into(self, attached: Attached) -> None:
        """Fills an attached candidate of the same sites and lower ranks with the nearest LoRA."""
        for part in attached.parts:
            for path, layer in part.layers.items():
                _fill(layer, *self._factors[path])
        for parameter, trained in zip(attached.head_parameters(), self._head, strict=True):
            parameter.copy_(trained)


def lora_factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of a LoRA layer's B, (out, rank), with the scaling in it, and A, (rank, in)."""
    b = layer.lora_B[ADAPTER_NAME].weight.detach() * layer.scaling[ADAPTER_NAME]
    return b.clone(), layer.lora_A[ADAPTER_NAME].weight.detach().clone()


def _fill(layer: Any, b: torch.Tensor, a: torch.Tensor) -> None:
    own_a, own_b = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
    rank = own_a.shape[0]
    # B A = Q_b (R_b R_a^T) Q_a^T: the decomposition of a (rank, rank) matrix is all it takes.
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    left, values, right = torch.linalg.svd(r_b @ r_a.T)
    root = values[:rank].sqrt()
    own_b.copy_((q_b @ left[:, :rank]) * root / layer.scaling[ADAPTER_NAME])
    own_a.copy_((root[:, None] * right[:rank]) @ q_a.T)
