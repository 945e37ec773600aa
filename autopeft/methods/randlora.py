"""RandLoRA: an update of full rank, of random bases with learned scales (arXiv 2502.00987)."""

from __future__ import annotations

from typing import Any

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape
from autopeft.plan import TrainSettings

_RANDLORA_SCALING = 10
"""peft's default, 20, at alpha ratio 2."""


class RandLora(Method):
    """x -> W x + scaling sum of B_i L_i A G_i x: `rank` is one basis's; small ones cost most.

    A and the B_i are random; the diagonal L_i start as zero. The bases come from a seed and are not
    saved. A is at the module's narrow side, which is equal for all sites of a pool.
    """

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """The diagonals L (rank numbers) and G (one for each feature of the narrow side)."""
        return _n_bases(rank, shape) * (rank + min(shape))

    def pool(self, shape: Shape) -> int:
        """Return the width of the narrow side, negative where that is the input.

        peft cuts the bases to size; over different narrow sides it would copy them at each step.
        """
        out, in_ = shape
        return out if out <= in_ else -in_

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """Two full products; the gradient of the scaled A, and through the B_i where A is first."""
        out, in_ = shape
        width = float(rank * _n_bases(rank, shape))
        narrow_in = in_ <= out
        return AdapterFlops(
            forward_per_token=2 * width * (in_ + out),
            backward_per_token=2 * width * (in_ + out if narrow_in else out),
            input_grad_per_token=2 * width * (in_ if narrow_in else in_ + out),
            # Sums of three factors, twice.
            backward_per_step=4 * width * min(shape),
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """What the scaled A is applied to; the scaled A itself."""
        width = rank * _n_bases(rank, shape)
        scaled = width * min(shape)
        if shape[1] <= shape[0]:
            return AdapterMemory(input_grad_per_step=scaled, keeps_input=True, drops_input=True)
        return AdapterMemory(per_token=width, input_grad_per_step=scaled, drops_input=True)

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `RandLoraConfig`."""
        return {
            "peft_type": "RANDLORA",
            "r": rank,
            "randlora_alpha": _RANDLORA_SCALING * train.alpha_ratio * rank,
            "randlora_dropout": train.dropout,
            "save_projection": False,
        }


def _n_bases(rank: int, shape: Shape) -> int:
    """Return how many bases give the update full rank."""
    return -(-min(shape) // rank)


METHODS: tuple[Method, ...] = (
    RandLora(
        name="randlora",
        keeps_fp32=True,
        default_ranks=(8, 16, 32, 64, 128),
        learning_rate=(1.5e-4, 8e-3),
        shared_state=True,
    ),
)
