"""VeRA: random matrices shared by all sites, two learned vectors each (arXiv 2310.11454)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape
from autopeft.plan import TrainSettings


@dataclass(frozen=True)
class Vera(Method):
    """x -> W x + b * B (d * A x): A and B are random and shared, b starts at zero.

    A and B have the size of the largest site and are cut for the others; they come from a seed and
    are not saved.
    """

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """The vectors b and d."""
        return shape[0] + rank

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """Two thin products forward; backward through B for d's gradient, A for the input's."""
        out, in_ = shape
        return AdapterFlops(
            forward_per_token=2.0 * rank * (in_ + out),
            backward_per_token=2.0 * rank * out,
            input_grad_per_token=2.0 * rank * in_,
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """A x, for d's gradient, and B's output, for b's."""
        return AdapterMemory(per_token=rank + shape[0], drops_input=True)

    def max_rank(self, shape: Shape) -> int:
        """VeRA's ranks may exceed a module's smaller side."""
        return max(shape)

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `VeraConfig`; it has no alpha."""
        return {
            "peft_type": "VERA",
            "r": rank,
            "vera_dropout": train.dropout,
            "save_projection": False,
        }


METHODS: tuple[Method, ...] = (
    Vera(
        name="vera",
        default_ranks=(16, 64, 128, 256, 512),
        learning_rate=(8e-3, 3e-1),
        converts_to_lora=True,
        shared_state=True,
    ),
)
