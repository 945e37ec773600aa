"""RoAd: pairs of a module's outputs are rotated and scaled in their plane (arXiv 2409.00119)."""

from __future__ import annotations

from typing import Any

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape
from autopeft.plan import TrainSettings

_VARIANTS = (1, 2, 4)
"""Variants: one angle and scale for each pair of outputs, one for each output, or two."""


_GROUP = 2
"""Size of the groups within which outputs are paired; this one divides every even width."""


class Road(Method):
    """y -> R y: R rotates and scales pairs of outputs; `rank` is the variant, 1, 2 or 4."""

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """Angles and scales."""
        return rank * shape[0]

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """Only elementwise work."""
        return AdapterFlops()

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The output, and a copy with each pair rotated by 90 degrees; sines and cosines."""
        return AdapterMemory(
            per_token=2.0 * shape[0],
            # Variant 1 repeats its numbers for both of a pair, variant 4 splits them.
            per_step=(2.0 if rank == 2 else 4.0) * shape[0],
            input_grad_per_step=2.0 * shape[0],
        )

    def is_legal_rank(self, rank: int, shape: Shape) -> bool:
        """The paper has three variants, and outputs come in pairs."""
        return rank in _VARIANTS and shape[0] % _GROUP == 0

    def rank_rule(self, shape: Shape) -> str:
        """Return the rule in words."""
        return f"the variant (rank) is 1, 2 or 4, and the output width {shape[0]} is even"

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `RoadConfig`; it has no dropout."""
        return {"peft_type": "ROAD", "variant": f"road_{rank}", "group_size": _GROUP}


METHODS: tuple[Method, ...] = (
    Road(
        name="road",
        default_ranks=_VARIANTS,
        learning_rate=(4e-3, 1.5e-1),
        transposed_base=False,
        keeps_fp32=True,
    ),
)
