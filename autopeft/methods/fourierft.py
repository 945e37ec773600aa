"""FourierFT: an update with few frequencies (arXiv 2405.03003)."""

from __future__ import annotations

from typing import Any

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape, dense_update_flops
from autopeft.plan import TrainSettings

_FOURIER_SCALING = 75.0
"""The paper's value, 150, at alpha ratio 2."""


class FourierFt(Method):
    """x -> W x + scaling F x: F has learned coefficients at `rank` random frequencies.

    The coefficients are zero at the start (the paper's are random). The frequencies come from a
    seed and are not saved.
    """

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """The coefficients."""
        return rank

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """A second full product for each token; the transform is not a matrix product."""
        return dense_update_flops(shape)

    def lora_rank(self, rank: int, shape: Shape) -> int:
        """Return the highest rank of a LoRA that equals it: a wave and its conjugate each."""
        return min(2 * rank, *shape[:2])

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input and the frequencies' indices; the update where the input needs a gradient."""
        # An 8-byte integer for each index.
        return AdapterMemory(
            per_step=2.0 * rank, input_grad_per_step=shape[0] * shape[1], keeps_input=True
        )

    def max_rank(self, shape: Shape) -> int:
        """There are as many coefficients as entries."""
        return shape[0] * shape[1]

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `FourierFTConfig`; it has no dropout."""
        return {
            "peft_type": "FOURIERFT",
            "n_frequency": rank,
            "scaling": _FOURIER_SCALING * train.alpha_ratio,
            "init_weights": True,
        }


METHODS: tuple[Method, ...] = (
    FourierFt(
        name="fourierft",
        default_ranks=(50, 100, 200, 500, 1000, 2000),
        learning_rate=(3e-2, 1.5),
        converts_to_lora=True,
    ),
)
