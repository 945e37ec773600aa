"""DeLoRA: LoRA with its strength learned separately from its directions (arXiv 2503.18225)."""

from __future__ import annotations

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape, low_rank_flops


class DeLora(Method):
    """x -> W x + (strength / rank) B A (w * x), rows of A and columns of B at length 1.

    w holds the norms of W's columns. B is zero at the start; after the first step its columns have
    length 1 at any learning rate, so the strength bounds that step.
    """

    peft_type = "DELORA"
    # With alpha ratio 2, the strength is peft's default (15) at peft's default rank (8).
    alpha_argument = "delora_lambda"
    dropout_argument = "module_dropout"  # It acts on the input.

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """A, B and the strength."""
        return rank * (shape[0] + shape[1]) + 1

    def frozen_floats(self, rank: int, shape: Shape, role: str = "") -> int:
        """The norms w."""
        return shape[1]

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """Two thin products forward; a gradient each for B, A w x, A and w x backward."""
        return low_rank_flops(rank, shape)

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """W x for A's gradient, A w x before and after scaling for the strength's and B's."""
        # Six numbers for the lengths of each direction, and the strength.
        return AdapterMemory(
            per_token=shape[1] + 2.0 * rank, per_step=6.0 * rank + 1, drops_input=True
        )


METHODS: tuple[Method, ...] = (
    DeLora(
        name="delora",
        learning_rate=(7e-4, 3e-2),
        converts_to_lora=True,
        quantized_base=False,  # It reads the columns of the base weight.
        transposed_base=False,
        rank_patterns=(("r", "rank_pattern"), ("delora_lambda", "lambda_pattern")),
    ),
)
