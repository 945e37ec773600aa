"""Prompt tuning: trained virtual tokens among the input embeddings of the whole model.

Source: Lester et al. (arXiv 2104.08691). peft's own acts on a whole `PeftModel` and leaves mask,
labels and logits of other lengths to the caller; `autopeft.models.tuners` has one that does not.
"""

from __future__ import annotations

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape
from autopeft.plan import MODEL


class Prompt(Method):
    """E of shape (rank, width) joins the embeddings of every row.

    The shape at the role "model" is (most virtual tokens, width of the embeddings). The tokens
    themselves cost nothing; the longer rows that every block computes do, see `PriceTable.longer`.
    """

    peft_type = "PROMPT_TOKENS"

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """One embedding for each token."""
        return rank * shape[1]

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """None of its own."""
        return AdapterFlops()

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """None of its own."""
        return AdapterMemory()

    def is_legal_rank(self, rank: int, shape: Shape) -> bool:
        """From 1 to the most virtual tokens that fit."""
        return 1 <= rank <= shape[0]

    def rank_rule(self, shape: Shape) -> str:
        """Return the rule in words."""
        return (
            f"`1 <= rank (virtual tokens) <= {shape[0]}` must hold (positions left beside the "
            "longest row: a smaller max_length leaves more)"
        )


METHODS: tuple[Method, ...] = (
    Prompt(
        name="prompt_tuning",
        roles=(MODEL,),
        default_ranks=(4, 8, 16, 32),
        # The paper trains at 0.3, with Adafactor.
        learning_rate=(5e-3, 3e-1),
        mergeable=False,
        # The model attends to any tokens: no prompt is without effect.
        starts_at_identity=False,
        exact_start=False,
    ),
)
