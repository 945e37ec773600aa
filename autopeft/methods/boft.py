"""BOFT: a block-diagonal rotation of a module's input and a scale of its output.

Source: arXiv 2311.06243. peft takes more than one butterfly factor only where it can compile a CUDA
extension; with one, the rotation is OFT's, by an exact Cayley transform.
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


METHODS: tuple[Method, ...] = (
    Boft(
        name="boft",
        default_ranks=(2, 4, 8, 16, 32),
        learning_rate=(1.5e-3, 6e-2),
        exact_start=False,  # The bias is subtracted and added again.
        transposed_base=False,
        input_side_roles=LINEAR_ROLES,
    ),
)
