"""GraLoRA: LoRA block by block (arXiv 2505.20355)."""

from __future__ import annotations

from typing import Any

from autopeft.methods.base import AdapterMemory, Method, Shape
from autopeft.methods.lora import Lora
from autopeft.plan import TrainSettings

_BLOCKS = 2
"""Blocks in each direction: the paper's advice for ranks up to 32."""


class GraLora(Lora):
    """A LoRA of rank `rank / 2` in each of 2 x 2 blocks: LoRA's cost, twice its rank."""

    def lora_rank(self, rank: int, shape: Shape) -> int:
        """Return the highest rank of a LoRA that equals it."""
        return min(_BLOCKS * rank, *shape[:2])

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input, and the inner values of the blocks of one column."""
        return AdapterMemory(per_token=_BLOCKS * rank, keeps_input=True, drops_input=True)

    def is_legal_rank(self, rank: int, shape: Shape) -> bool:
        """Blocks divide the rank and both widths."""
        return super().is_legal_rank(rank, shape) and not any(n % _BLOCKS for n in (rank, *shape))

    def rank_rule(self, shape: Shape) -> str:
        """Return the rule in words."""
        return f"`2 <= rank <= {min(shape)}` must hold, rank and both widths being even,"

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `GraloraConfig`."""
        return {
            "peft_type": "GRALORA",
            "r": rank,
            "alpha": train.alpha_for(rank),
            "gralora_dropout": train.dropout,
            "gralora_k": _BLOCKS,
        }


METHODS: tuple[Method, ...] = (
    GraLora(
        name="gralora",
        default_ranks=(2, 4, 8, 16, 32),
        learning_rate=(5e-4, 2e-2),
        converts_to_lora=True,
    ),
)
