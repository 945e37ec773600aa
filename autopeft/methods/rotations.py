"""Rotations of a module's input, or inside a weight's principal subspace: BOFT, HRA and PSOFT.

Sources: BOFT arXiv 2311.06243, HRA arXiv 2405.17484, PSOFT openreview FSHrinMArK. For OFT see
`autopeft.methods.oft`.
"""

from __future__ import annotations

from typing import Any

from autopeft.methods.base import LINEAR_ROLES, AdapterFlops, AdapterMemory, Method, Shape
from autopeft.methods.oft import Oft
from autopeft.plan import TrainSettings


class Boft(Oft):
    """x -> s * (W R x): R has orthogonal blocks; `rank` is their size; s starts at one.

    peft takes more than one butterfly factor only where it can compile a CUDA extension; with one,
    the rotation is OFT's, by an exact Cayley transform.
    """

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """Each block in full, although only its skew part matters, and s."""
        return shape[1] * rank + shape[0]

    def held_floats(self, rank: int, shape: Shape, role: str = "") -> int:
        """A permutation matrix, here the identity."""
        return int(shape[1] ** 2)

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """A full rotation for each token; each step multiplies it with two permutations and s."""
        _, in_ = shape
        rotation = 2.0 * in_**2
        return AdapterFlops(
            forward_per_token=rotation,
            backward_per_token=rotation,
            input_grad_per_token=rotation,
            forward_per_step=3 * rotation * in_,
            # The same three products, and the solver's own gradient.
            backward_per_step=3 * rotation * in_ + 2.0 * in_ * rank**2,
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input and the unscaled output; for each step an identity and the solver's factors."""
        out, in_ = shape
        return AdapterMemory(
            per_token=out,
            per_step=in_**2 + 3.0 * in_ * rank + 2.0 * out,
            input_grad_per_step=in_**2,
            keeps_input=True,
        )

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `BOFTConfig`."""
        return {
            "peft_type": "BOFT",
            "boft_block_size": rank,
            "boft_n_butterfly_factor": 1,
            "boft_dropout": train.dropout,
        }


class Hra(Method):
    """x -> W H1 .. Hr x: each H reflects at a learned direction; pairs start equal and cancel."""

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """The directions."""
        return rank * shape[1]

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """Only the weight's gradient for each token; each step recomputes the weight."""
        out, in_ = shape
        chain = 4.0 * rank * in_**2
        weight = 2.0 * in_**3 + 2.0 * out * in_**2
        return AdapterFlops(
            backward_per_token=2.0 * out * in_,
            forward_per_step=chain + weight,
            # The first reflection acts on a constant.
            backward_per_step=2 * chain - 2.0 * in_**2 + weight,
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input; a matrix for each reflection and the constant it starts from."""
        out, in_ = shape
        return AdapterMemory(
            per_step=(rank + 1.0) * in_**2 + 2.0 * rank * in_,
            input_grad_per_step=out * in_,
            keeps_input=True,
        )

    def is_legal_rank(self, rank: int, shape: Shape) -> bool:
        """Reflections come in pairs, which start as the identity."""
        return 2 <= rank <= min(shape) and rank % 2 == 0

    def rank_rule(self, shape: Shape) -> str:
        """Return the rule in words."""
        return f"the number of reflections (rank) is even and from 2 to {min(shape)}"

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `HRAConfig`; it has no dropout."""
        return {"peft_type": "HRA", "r": rank}


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
    Boft(
        name="boft",
        default_ranks=(2, 4, 8, 16, 32),
        learning_rate=(1.5e-3, 6e-2),
        exact_start=False,  # The bias is subtracted and added again.
        transposed_base=False,
        input_side_roles=LINEAR_ROLES,
    ),
    Hra(
        name="hra",
        default_ranks=(2, 4, 8, 16, 32),
        learning_rate=(8e-3, 3e-1),
        # W H - W = W (H - 1), and H differs from 1 by `rank` directions.
        converts_to_lora=True,
        exact_start=False,  # Two equal reflections cancel up to rounding.
        quantized_base=False,
        transposed_base=False,
    ),
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
