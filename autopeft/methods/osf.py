"""OSF: a weight's smallest singular directions are trained, the others kept (arXiv 2504.07097)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape, low_rank_flops
from autopeft.plan import TrainSettings

_OSF_STEPS = 64
"""`rank` counts in this fraction of all singular directions, so it means the same everywhere."""


def _osf_directions(rank: int, shape: Shape) -> int:
    """Return how many are trained; peft rounds the number of frozen ones down."""
    width = min(shape)
    return width - width * (_OSF_STEPS - rank) // _OSF_STEPS


class Osf(Method):
    """x -> W x + (U S V - U0 S0 V0) x: the `rank` 64ths of W's smallest singular directions.

    peft's files hold U, S and V; U0, S0 and V0 are computed again from the base model.
    """

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """U, S and V."""
        return _osf_directions(rank, shape) * (shape[0] + shape[1] + 1)

    def held_floats(self, rank: int, shape: Shape, role: str = "") -> int:
        """U0, S0 and V0, and the longer side's frozen directions, which are projected off."""
        trained = _osf_directions(rank, shape)
        longer = max(shape) if shape[0] != shape[1] else 0
        return self.n_params(rank, shape, role) + (min(shape) - trained) * longer

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """LoRA's at twice the size; gradients are projected off the frozen directions."""
        out, in_ = shape
        trained = _osf_directions(rank, shape)
        kept = min(shape) - trained

        def projection(width: int) -> float:
            # The longer side's complement is wider than what is trained.
            return 4.0 * width * trained * (kept if width > min(shape) else trained)

        return replace(
            low_rank_flops(2 * trained, shape), backward_per_step=projection(out) + projection(in_)
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """LoRA's at twice the size, and the two factors."""
        out, in_ = shape
        trained = _osf_directions(rank, shape)
        return AdapterMemory(
            per_token=2.0 * trained,
            per_step=2.0 * trained * out,
            input_grad_per_step=2.0 * trained * in_,
            keeps_input=True,
        )

    def is_legal_rank(self, rank: int, shape: Shape) -> bool:
        """At least one direction is trained and one frozen."""
        return 1 <= rank < _OSF_STEPS and 0 < _osf_directions(rank, shape) < min(shape)

    def rank_rule(self, shape: Shape) -> str:
        """Return the rule in words."""
        return f"rank counts {_OSF_STEPS}ths of {min(shape)} directions; not all can be trained"

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `OSFConfig`; it has no dropout."""
        return {"peft_type": "OSF", "effective_rank": (_OSF_STEPS - rank) / _OSF_STEPS}


METHODS: tuple[Method, ...] = (
    Osf(
        name="osf",
        default_ranks=(1, 2, 4, 8, 16),
        learning_rate=(1e-4, 5e-3),
        exact_start=False,  # Two equal terms cancel up to rounding.
        quantized_base=False,
        transposed_base=False,
    ),
)
