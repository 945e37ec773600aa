"""LoRAs whose entries come from learned vectors that sites share: VB-LoRA and Uni-LoRA.

Sources: VB-LoRA arXiv 2405.15179, Uni-LoRA arXiv 2506.00799.
"""

from __future__ import annotations

import math
from typing import Any

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape, low_rank_flops
from autopeft.plan import TrainSettings

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

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `VBLoRAConfig`; it has no alpha."""
        return {
            "peft_type": "VBLORA",
            "r": rank,
            "topk": _TOP,
            "vblora_dropout": train.dropout,
        }

    def pool_config(self, pool: int) -> dict[str, Any]:
        """The bank's size."""
        return {"vector_length": pool, "num_vectors": _n_vectors(pool)}


def _n_vectors(length: int) -> int:
    return min(length, _MOST_VECTORS)


_UNILORA_RANK = 4
"""Rank of the LoRAs; the paper's."""


class UniLora(Method):
    """x -> W x + B A x: every entry of A and B is one of `rank` learned numbers, scaled.

    The assignment comes from a seed and is not saved.
    """

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """None: a site has no parameters of its own."""
        return 0

    def shared_params(self, rank: int, pool: int = 0) -> int:
        """The vector."""
        return rank

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """LoRA's."""
        return low_rank_flops(_UNILORA_RANK, shape)

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """LoRA's, and B; A where the input needs a gradient: both are made at each step."""
        out, in_ = shape
        return AdapterMemory(
            per_token=_UNILORA_RANK,
            per_step=_UNILORA_RANK * out,
            input_grad_per_step=_UNILORA_RANK * in_,
            keeps_input=True,
            drops_input=True,
        )

    def max_rank(self, shape: Shape) -> int:
        """With more numbers than one site has entries, some might be unused."""
        return _UNILORA_RANK * sum(shape)

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `UniLoraConfig`; it has no alpha."""
        return {
            "peft_type": "UNILORA",
            "r": _UNILORA_RANK,
            "theta_d_length": rank,
            "unilora_dropout": train.dropout,
        }


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
    UniLora(
        name="unilora",
        default_ranks=(64, 256, 1024, 2048, 4096),
        learning_rate=(8e-3, 3e-1),
        converts_to_lora=True,
        shared_state=True,
        # With a vector of zeros neither A nor B would get a gradient.
        starts_at_identity=False,
        exact_start=False,
        quantized_base=False,  # peft stores the scales in the type of the base weight.
    ),
)
