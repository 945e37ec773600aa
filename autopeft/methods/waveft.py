"""WaveFT: an update with few wavelet coefficients (arXiv 2505.12532)."""

from __future__ import annotations

from typing import Any

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape, dense_update_flops
from autopeft.methods.fourierft import FourierFt
from autopeft.plan import TrainSettings

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
            shape, forward_per_step=convolution, backward_per_step=convolution
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
    WaveFt(
        name="waveft",
        default_ranks=(50, 100, 200, 500, 1000, 2000),
        learning_rate=(1e-3, 4e-2),
        converts_to_lora=True,
    ),
)
