"""Gated prefixes: trained keys and values in front of one self-attention.

Sources: prefix tuning (arXiv 2101.00190), gated from zero as in LLaMA-Adapter (arXiv 2303.16199).
peft has both for a whole model only; `autopeft.models.tuners` has one for a single attention.
"""

from __future__ import annotations

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape


class Prefix(Method):
    """Each head adds tanh(g) softmax(q K^T) V: K and V hold rank tokens, g is 0 at the start.

    The shape at the role "attn" is (heads, total width of the heads).
    """

    peft_type = "GATED_PREFIX"

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
)
