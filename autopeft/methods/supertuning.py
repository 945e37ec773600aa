"""Super-Tuning: the largest entries of a weight are trained (arXiv 2607.09287)."""

from __future__ import annotations

from typing import Any

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape
from autopeft.plan import TrainSettings

_SUPER_STEPS = 1024
"""`rank` counts in this fraction of a weight's entries."""


class Supertuning(Method):
    """x -> (W + S) x: S starts at zero and covers only the largest `rank` 1024ths of W."""

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """The entries."""
        return shape[0] * shape[1] * rank // _SUPER_STEPS

    def frozen_floats(self, rank: int, shape: Shape, role: str = "") -> int:
        """The index of each entry."""
        return self.n_params(rank, shape, role)

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """The gradient of the whole weight, though only a few entries are used."""
        return AdapterFlops(backward_per_token=2.0 * shape[0] * shape[1])

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input and the entries' indices; the new weight where the input needs a gradient."""
        return AdapterMemory(
            per_step=2.0 * self.n_params(rank, shape, role),
            input_grad_per_step=shape[0] * shape[1],
            keeps_input=True,
        )

    def is_legal_rank(self, rank: int, shape: Shape) -> bool:
        """At least one entry."""
        return 1 <= rank <= _SUPER_STEPS and self.n_params(rank, shape) >= 1

    def rank_rule(self, shape: Shape) -> str:
        """Return the rule in words."""
        return f"rank counts {_SUPER_STEPS}ths of {shape[0] * shape[1]} entries, at least one entry"

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `SupertuningConfig`; it has no dropout."""
        return {"peft_type": "SUPERTUNING", "sparsity": 1.0 - rank / _SUPER_STEPS}


METHODS: tuple[Method, ...] = (
    Supertuning(
        name="supertuning", learning_rate=(2e-3, 8e-2), quantized_base=False, transposed_base=False
    ),
)
