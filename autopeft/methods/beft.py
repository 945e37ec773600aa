"""BEFT: a bias beside a module, trained alone (arXiv 2509.15974)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape
from autopeft.plan import TrainSettings


@dataclass(frozen=True)
class Beft(Method):
    """y -> y + b: b starts at zero."""

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """One number for each output."""
        return shape[0]

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """A sum: nothing."""
        return AdapterFlops()

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """A sum needs nothing to be kept."""
        return AdapterMemory()

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `BeftConfig`; it has no dropout."""
        return {"peft_type": "BEFT"}


METHODS: tuple[Method, ...] = (
    Beft(
        name="beft",
        default_ranks=(),
        learning_rate=(1.5e-3, 5e-2),
        # A module without a bias of its own, as in most decoders, has no place for it.
        mergeable=False,
        transposed_base=False,
    ),
)
