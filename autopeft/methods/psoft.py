"""PSOFT: a rotation inside a weight's principal subspace (openreview FSHrinMArK)."""

from __future__ import annotations

from typing import Any

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape
from autopeft.plan import TrainSettings


class Psoft(Method):
    """x -> W x + B (R - 1) A x: frozen B A is W's leading part, R a scaled rotation, 1 at first.

    When it loads R, peft computes A and B again from the base model's weight.
    """

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """The upper triangle that defines R, and two vectors that scale it."""
        return rank * (rank - 1) // 2 + 2 * rank

    def frozen_floats(self, rank: int, shape: Shape, role: str = "") -> int:
        """The signs of A's rows, which may differ in a decomposition elsewhere."""
        return rank

    def held_floats(self, rank: int, shape: Shape, role: str = "") -> int:
        """A and B, and each number's index in R as an 8-byte integer."""
        places = 2 * rank * (rank - 1)
        return rank * (shape[0] + shape[1]) + places + self.frozen_floats(rank, shape, role)

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """Two thin products and a small one forward; no gradient for the frozen A and B."""
        out, in_ = shape
        rotation = 2.0 * rank**2
        return AdapterFlops(
            forward_per_token=2.0 * rank * (in_ + out) + rotation,
            backward_per_token=2.0 * rank * out + rotation,
            input_grad_per_token=2.0 * rank * in_ + rotation,
            backward_per_step=2.0 * rank**3,  # The solver in the Cayley transform.
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """A x, for R's gradient; the Cayley transform's factors and the scaled steps of R."""
        matrix = 1.0 * rank**2
        return AdapterMemory(
            per_token=rank,
            per_step=4.0 * matrix + rank,
            input_grad_per_step=matrix,
            drops_input=True,
        )

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `PsoftConfig`."""
        return {
            "peft_type": "PSOFT",
            "r": rank,
            # B is divided by the scaling, so any alpha gives the same adapter.
            "psoft_alpha": rank,
            "psoft_dropout": train.dropout,
        }


METHODS: tuple[Method, ...] = (
    Psoft(
        name="psoft",
        min_rank=2,  # A rotation needs two directions.
        default_ranks=(8, 16, 32, 64, 128),
        learning_rate=(4e-3, 1.5e-1),
        converts_to_lora=True,
        quantized_base=False,
        transposed_base=False,
    ),
)
