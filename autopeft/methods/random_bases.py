"""Learned mixtures of random matrices: TinyLoRA and RandLoRA.

Sources: TinyLoRA arXiv 2602.04118, RandLoRA arXiv 2502.00987.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape
from autopeft.plan import TrainSettings

_DIRECTIONS = 2
"""Singular directions of the weight; the best value in the paper."""

_MOST_TIED = 1024


@dataclass(frozen=True)
class TinyLora(Method):
    """x -> W x + U R V x with R = sum of v_i P_i: v has `rank` numbers and starts at zero.

    U and V are W's first singular vectors, scaled; the matrices P come from a seed and are not
    saved.

    Attributes:
        is_tied: True if all sites of one size share one v.
    """

    is_tied: bool = False

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """v, where each site has its own."""
        return 0 if self.is_tied else rank

    def shared_params(self, rank: int, pool: int = 0) -> int:
        """v, where all sites share it."""
        return rank if self.is_tied else 0

    def frozen_floats(self, rank: int, shape: Shape, role: str = "") -> int:
        """U and V."""
        return _DIRECTIONS * sum(shape)

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """Three thin products forward; backward through U for R's gradient, V for the input's.

        The matrices are mixed once a step.
        """
        out, in_ = shape
        squared = float(_DIRECTIONS**2)
        return AdapterFlops(
            forward_per_token=2 * squared + 2.0 * _DIRECTIONS * (in_ + out),
            backward_per_token=2 * squared + 2.0 * _DIRECTIONS * out,
            input_grad_per_token=2 * squared + 2.0 * _DIRECTIONS * in_,
            forward_per_step=2 * rank * squared,
            backward_per_step=2 * rank * squared,
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """V x, for R's gradient; R."""
        return AdapterMemory(
            per_token=_DIRECTIONS, input_grad_per_step=_DIRECTIONS**2, drops_input=True
        )

    def is_legal_rank(self, rank: int, shape: Shape) -> bool:
        """More numbers than R has entries are useful only where several sites share them."""
        most = _MOST_TIED if self.is_tied else _DIRECTIONS**2
        return 1 <= rank <= most and min(shape) >= _DIRECTIONS

    def rank_rule(self, shape: Shape) -> str:
        """Return the rule in words."""
        most = _MOST_TIED if self.is_tied else _DIRECTIONS**2
        return f"`1 <= rank <= {most}` must hold and the module have {_DIRECTIONS} dimensions"

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `TinyLoraConfig`; it has no alpha."""
        return {
            "peft_type": "TINYLORA",
            "r": _DIRECTIONS,
            "u": rank,
            "weight_tying": float(self.is_tied),
            "tinylora_dropout": train.dropout,
            "save_projection": False,
        }


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
    TinyLora(
        name="tinylora",
        default_ranks=(1, 2, 4),
        learning_rate=(1e-2, 4e-1),
        converts_to_lora=True,
        shared_state=True,
        quantized_base=False,  # It needs the weight's singular vectors.
    ),
    TinyLora(
        name="tinylora_tied",
        default_ranks=(4, 13, 32, 64, 128),
        learning_rate=(1e-2, 4e-1),
        converts_to_lora=True,
        shared_state=True,
        quantized_base=False,
        is_tied=True,
    ),
    RandLora(
        name="randlora",
        default_ranks=(8, 16, 32, 64, 128),
        learning_rate=(1.5e-4, 8e-3),
        shared_state=True,
    ),
)
