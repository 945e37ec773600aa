"""Updates made of the weight itself: its entries, its subspaces, or a function of it.

Sources: SHiRA arXiv 2406.13175, PEANuT arXiv 2410.01870, DEFT from Decompositional Efficient
Fine-Tuning for Text-to-Image Models (NeurIPS 2025), OSF arXiv 2504.07097, Super-Tuning arXiv
2607.09287.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autopeft.methods.base import (
    AdapterFlops,
    AdapterMemory,
    Method,
    Shape,
    dense_update_flops,
    low_rank_flops,
)
from autopeft.plan import TrainSettings


class Shira(Method):
    """x -> (W + S) x: S is sparse, zero at the start, with as many entries as a LoRA's."""

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """As many as in LoRA's A and B."""
        return rank * (shape[0] + shape[1])

    def frozen_floats(self, rank: int, shape: Shape, role: str = "") -> int:
        """Row and column of each entry."""
        return 2 * self.n_params(rank, shape, role)

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """The gradient of the whole weight, though only a few entries are used."""
        return AdapterFlops(backward_per_token=2.0 * shape[0] * shape[1])

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input, the entries and their indices; the weight where the input needs a gradient."""
        return AdapterMemory(
            per_step=5.0 * self.n_params(rank, shape, role),
            input_grad_per_step=shape[0] * shape[1],
            keeps_input=True,
        )

    def max_rank(self, shape: Shape) -> int:
        """The weight must have that many entries."""
        return shape[0] * shape[1] // sum(shape)

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `ShiraConfig`; it has no dropout."""
        return {"peft_type": "SHIRA", "r": rank}


class Peanut(Method):
    """x -> (W + B relu(A W)) x: A (rank, out) is random, B (out, rank) zero at the start."""

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """A and B."""
        return 2 * rank * shape[0]

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """A second full product for each token; two thin ones with the weight for each step."""
        product = 2.0 * shape[0] * shape[1]
        return dense_update_flops(
            shape,
            forward_per_step=2 * rank * product,
            backward_per_step=3 * rank * product,
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input and relu(A W); the update where the input needs a gradient."""
        out, in_ = shape
        return AdapterMemory(per_step=rank * in_, input_grad_per_step=out * in_, keeps_input=True)

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `PeanutConfig`; it has no dropout and scales by alpha / rank."""
        return {"peft_type": "PEANUT", "r": rank, "scaling": train.alpha_ratio}


class Deft(Method):
    """x -> (1 - P relu(P)^T) W x + P R x: P (out, rank) is random, R starts as relu(P)^T W."""

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """P and R."""
        return rank * (shape[0] + shape[1])

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """Three thin products with P and one with R; P gets three gradients."""
        out, in_ = shape
        return AdapterFlops(
            forward_per_token=2.0 * rank * (3 * out + in_),
            backward_per_token=2.0 * rank * (5 * out + in_),
            input_grad_per_token=2.0 * rank * (out + in_),
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input, the module's output, and the outputs of the subspace and of R."""
        out, in_ = shape
        return AdapterMemory(
            per_token=out + 2.0 * rank,
            per_step=rank * out,
            input_grad_per_step=rank * in_,
            keeps_input=True,
            drops_input=True,
        )

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `DeftConfig`."""
        return {
            "peft_type": "DEFT",
            "r": rank,
            "alpha": train.alpha_ratio * rank,
            "deft_dropout": train.dropout,
        }


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
            low_rank_flops(2 * trained, shape),
            backward_per_step=projection(out) + projection(in_),
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
    Shira(
        name="shira",
        learning_rate=(1.5e-3, 6e-2),
        quantized_base=False,
        transposed_base=False,
    ),
    Peanut(
        name="peanut",
        learning_rate=(5e-4, 1.5e-2),
        converts_to_lora=True,
        quantized_base=False,
        transposed_base=False,
    ),
    Deft(
        name="deft",
        learning_rate=(4e-4, 1.2e-2),
        converts_to_lora=True,
        exact_start=False,  # What is removed and what is added are equal up to rounding.
        quantized_base=False,
    ),
    Osf(
        name="osf",
        default_ranks=(1, 2, 4, 8, 16),
        learning_rate=(1e-4, 5e-3),
        exact_start=False,  # Two equal terms cancel up to rounding.
        quantized_base=False,
        transposed_base=False,
    ),
    Supertuning(
        name="supertuning",
        learning_rate=(2e-3, 8e-2),
        quantized_base=False,
        transposed_base=False,
    ),
)
