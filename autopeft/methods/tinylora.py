"""TinyLoRA: few numbers mix random matrices between singular vectors (arXiv 2602.04118)."""

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

    def lora_rank(self, rank: int, shape: Shape) -> int:
        """Return the highest rank of a LoRA that equals it: that of the fixed U and V."""
        return min(_DIRECTIONS, *shape[:2])

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
)
