"""Virtual tokens: gated prefixes of one self-attention, and prompts of the whole model.

Sources: prefix tuning (arXiv 2101.00190), gated from zero as in LLaMA-Adapter (arXiv 2303.16199);
prompt tuning (arXiv 2104.08691). peft has both for whole models only, and leaves mask, labels and
logits of other lengths to the caller; `autopeft.models.tuners` has one for a single attention, and
handles the lengths.
"""

from __future__ import annotations

from typing import Any

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape
from autopeft.plan import MODEL, TrainSettings


class Prefix(Method):
    """Each head adds tanh(g) softmax(q K^T) V: K and V hold rank tokens, g is 0 at the start.

    The shape at the role "attn" is (heads, total width of the heads).
    """

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """Keys and values of every head, and a gate for each head."""
        return 2 * rank * shape[1] + shape[0]

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """Scores and mixtures forward; a gradient each for K, V and the weights backward."""
        product = 2.0 * rank * shape[1]
        return AdapterFlops(
            forward_per_token=2.0 * product,
            backward_per_token=3.0 * product,
            input_grad_per_token=product,
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The queries, each head's attention weights, and the gated values."""
        heads, width = shape
        return AdapterMemory(
            per_token=heads * rank, per_step=rank * width + heads, keeps_input=True
        )

    def max_rank(self, shape: Shape) -> int:
        """The total width of the heads; longer prefixes have no known use."""
        return shape[1]

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `autopeft.models.tuners.GatedPrefixConfig`."""
        return {"peft_type": "GATED_PREFIX", "r": rank}


class Prompt(Method):
    """E of shape (rank, width) joins the embeddings of every row.

    The shape at the role "model" is (most virtual tokens, width of the embeddings). The tokens
    themselves cost nothing; the longer rows that every block computes do, see `PriceTable.longer`.
    """

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

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `autopeft.models.tuners.PromptConfig`."""
        return {"peft_type": "PROMPT_TOKENS", "r": rank}


METHODS: tuple[Method, ...] = (
    Prefix(
        name="prefix",
        roles=("attn",),
        default_ranks=(1, 2, 4, 8, 16, 32, 64),
        # LLaMA-Adapter trains at 9e-3.
        learning_rate=(5e-3, 2e-1),
        mergeable=False,
        rank_patterns=(("r", "rank_pattern"),),
    ),
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
