"""AdaLoRA: ranks move to the sites that need them during training (arXiv 2303.10512)."""

from __future__ import annotations

import math
from typing import Any

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape, low_rank_flops
from autopeft.plan import TrainSettings

_WARMUP, _SETTLING = 0.1, 0.3
"""Shares of the steps before the first triplet is dropped, and after the last."""


class AdaLora(Method):
    """x -> W x + scaling B E A x: B and A nearly orthogonal, E diagonal and zero at the start.

    Each site starts with 1.5 times `rank` triplets (a column of B, an entry of E, a row of A). The
    least important ones among all sites of one rank are dropped until `rank` are left on average.
    A dropped triplet has a 0 in E; it stays in memory and in the costs.

    The costs leave out the orthogonality penalty: two products of rank^2 for each module and step,
    less than a thousandth of a step at usual batch sizes.
    """

    @staticmethod
    def first_rank(rank: int) -> int:
        """Triplets at the start."""
        return math.ceil(1.5 * rank)

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """All triplets at the start."""
        return self.first_rank(rank) * (shape[0] + shape[1] + 1)

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """LoRA's, at the starting rank."""
        return low_rank_flops(self.first_rank(rank), shape)

    def lora_rank(self, rank: int, shape: Shape) -> int:
        """Return the highest rank of a LoRA that equals it, before any was pruned."""
        return min(self.first_rank(rank), *shape[:2])

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input for E A's gradient, E A x for B's; E A where the input needs a gradient."""
        first = self.first_rank(rank)
        return AdapterMemory(
            per_token=first,
            per_step=1.0,
            input_grad_per_step=first * shape[1],
            keeps_input=True,
            drops_input=True,
        )

    def is_legal_rank(self, rank: int, shape: Shape) -> bool:
        """At most as many triplets at the start as the module's smaller side."""
        return rank >= 1 and self.first_rank(rank) <= min(shape)

    def rank_rule(self, shape: Shape) -> str:
        """Return the rule in words."""
        return f"`1 <= rank` and `1.5 * rank <= {min(shape)}` must hold"

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `AdaLoraConfig`."""
        first = self.first_rank(rank)
        return {
            "peft_type": "ADALORA",
            "target_r": rank,
            "init_r": first,
            # peft divides by the rank at the start.
            "lora_alpha": train.alpha_for(first),
            "lora_dropout": train.dropout,
            # Triplets are scored one step before the last ones are dropped.
            "total_step": max(2, train.steps),
            "tinit": int(_WARMUP * train.steps),
            "tfinal": int(_SETTLING * train.steps),
            "deltaT": max(1, train.steps // 100),
        }


METHODS: tuple[Method, ...] = (
    AdaLora(
        name="adalora",
        default_ranks=(1, 2, 4, 8, 16),
        # One entry of E moves a whole triplet of length 1 by the learning rate.
        learning_rate=(8e-3, 2e-1),
        converts_to_lora=True,
    ),
)
