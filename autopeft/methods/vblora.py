"""VB-LoRA: LoRAs put together from pieces out of one bank of vectors (arXiv 2405.15179)."""

from __future__ import annotations

import math
from typing import Any

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape, low_rank_flops

_TOP = 2
"""Vectors mixed into one piece: the paper's K."""


_SHORTEST, _LONGEST = 8, 256
"""Shortest and longest vector; the paper uses 256."""


_MOST_VECTORS = 90
"""Vectors in a bank, as in the paper; fewer where vectors are short, or the logits would outnumber
the entries."""


class VbLora(Method):
    """x -> W x + B A x: each piece of A and B mixes the two vectors that its logits choose.

    All sites of one rank whose sides can be cut into pieces of one length (the largest power of two
    that divides both) share a bank.
    """

    peft_type = "VBLORA"
    dropout_argument = "vblora_dropout"
    fixed_arguments = (("topk", _TOP),)

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """Logits for each piece."""
        length = self.pool(shape)
        return rank * (shape[0] + shape[1]) // length * _n_vectors(length)

    def pool(self, shape: Shape) -> int:
        """The length of the vectors."""
        common = math.gcd(*shape)
        return min(common & -common, _LONGEST)

    def shared_params(self, rank: int, pool: int = 0) -> int:
        """The bank."""
        return _n_vectors(pool) * pool

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """LoRA's: choosing and mixing vectors is no matrix product."""
        return low_rank_flops(rank, shape)

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input and A x; for each piece its vectors, weights and 8-byte indices; B, A."""
        out, in_ = shape
        length = self.pool(shape)
        pieces = rank * (out + in_) / length
        return AdapterMemory(
            per_token=rank,
            per_step=pieces * _TOP * (length + 3) + rank * out,
            input_grad_per_step=rank * in_,
            keeps_input=True,
            drops_input=True,
        )

    def is_legal_rank(self, rank: int, shape: Shape) -> bool:
        """Both sides must be multiples of a vector's length."""
        return super().is_legal_rank(rank, shape) and self.pool(shape) >= _SHORTEST

    def rank_rule(self, shape: Shape) -> str:
        """Return the rule in words."""
        return f"`1 <= rank <= {min(shape)}` must hold and both sides be multiples of {_SHORTEST}"

    def pool_config(self, pool: int) -> dict[str, Any]:
        """The bank's size."""
        return {"vector_length": pool, "num_vectors": _n_vectors(pool)}


def _n_vectors(length: int) -> int:
    return min(length, _MOST_VECTORS)


METHODS: tuple[Method, ...] = (
    VbLora(
        name="vblora",
        default_ranks=(1, 2, 4, 8),
        learning_rate=(1e-3, 3e-2),
        converts_to_lora=True,
        shared_state=True,
        # A bank of zeros would never get a gradient, so A and B start with small values.
        starts_at_identity=False,
        exact_start=False,
    ),
)
