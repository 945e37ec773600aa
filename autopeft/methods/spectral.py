"""Updates with few Fourier or wavelet coefficients: C3A, FourierFT and WaveFT.

Sources: C3A, whose blocks are circulant, arXiv 2407.19342; FourierFT arXiv 2405.03003; WaveFT arXiv
2505.12532.
"""

from __future__ import annotations

from typing import Any

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape, dense_update_flops
from autopeft.plan import TrainSettings


class C3A(Method):
    """x -> W x + C x / in: C has circulant blocks, zero at the start; `rank` is their size.

    Larger blocks have fewer parameters.
    """

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """One row of each block."""
        return shape[0] * shape[1] // rank

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """Products of Fourier coefficients; the transforms are not matrix products."""
        product = 2.0 * shape[0] * shape[1] / rank
        # peft computes the input's gradient even where it is not needed.
        return AdapterFlops(forward_per_token=product, backward_per_token=2 * product)

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input."""
        return AdapterMemory(keeps_input=True)

    def is_legal_rank(self, rank: int, shape: Shape) -> bool:
        """Blocks are square and cover the weight."""
        return rank >= 1 and shape[0] % rank == 0 and shape[1] % rank == 0

    def rank_rule(self, shape: Shape) -> str:
        """Return the rule in words."""
        return f"the block size (rank) divides both {shape[0]} and {shape[1]}"

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `C3AConfig`, initialized at zero; it has no dropout."""
        return {"peft_type": "C3A", "block_size": rank, "init_weights": True}


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


_WAVELET_SCALING = 12.5
"""peft's default, 25, at alpha ratio 2."""


class WaveFt(FourierFt):
    """x -> W x + scaling V x: V has `rank` learned Haar coefficients at random places.

    The coefficients start at zero. Their places come from a seed and are not saved.
    """

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """A second full product for each token; each step one transposed convolution."""
        convolution = 8.0 * _even(shape[0]) * _even(shape[1])
        return dense_update_flops(
            shape,
            forward_per_step=convolution,
            backward_per_step=convolution,
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input, the coefficients and their indices; the update for the input's gradient."""
        coefficients = 1.0 * _even(shape[0]) * _even(shape[1])
        return AdapterMemory(
            # An 8-byte integer and a flag for each index; four filters of 2 x 2.
            per_step=coefficients + 2.25 * rank + 16,
            input_grad_per_step=shape[0] * shape[1],
            keeps_input=True,
        )

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `WaveFTConfig`; it has no dropout."""
        return {
            "peft_type": "WAVEFT",
            "n_frequency": rank,
            "scaling": _WAVELET_SCALING * train.alpha_ratio,
        }


def _even(size: int) -> int:
    """Return the size padded to an even one: wavelets halve it."""
    return size + size % 2


METHODS: tuple[Method, ...] = (
    C3A(
        name="c3a",
        default_ranks=(32, 64, 128, 256, 384, 768),
        # Entries are divided by the input width, so they must grow large.
        learning_rate=(4e-2, 2.0),
        converts_to_lora=False,
        transposed_base=False,
    ),
    FourierFt(
        name="fourierft",
        default_ranks=(50, 100, 200, 500, 1000, 2000),
        learning_rate=(3e-2, 1.5),
        converts_to_lora=True,
    ),
    WaveFt(
        name="waveft",
        default_ranks=(50, 100, 200, 500, 1000, 2000),
        learning_rate=(1e-3, 4e-2),
        converts_to_lora=True,
    ),
)
