"""LoHa: the product, entry by entry, of two low-rank updates (FedPara, arXiv 2108.06098)."""

from __future__ import annotations

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape, dense_update_flops


class LoHa(Method):
    """x -> W x + scaling ((A1 B1) * (A2 B2)) x: of rank up to rank^2; B2 is zero at the start."""

    peft_type = "LOHA"
    alpha_argument = "alpha"
    dropout_argument = "rank_dropout"  # It acts on the update's rows.

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """Two pairs of factors."""
        return 2 * rank * (shape[0] + shape[1])

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """A second full product for each token; each step builds the update's two factors."""
        product = 2.0 * shape[0] * shape[1]
        return dense_update_flops(
            shape,
            forward_per_step=2 * rank * product,
            # Both factors are recomputed, then each gives a gradient to its two halves.
            backward_per_step=6 * rank * product,
        )

    def lora_rank(self, rank: int, shape: Shape) -> int:
        """Return the highest rank of a LoRA that equals it: an entrywise product."""
        return min(rank**2, *shape[:2])

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input and the scaling; the update where the input needs a gradient."""
        return AdapterMemory(
            per_step=1.0, input_grad_per_step=shape[0] * shape[1], keeps_input=True
        )


METHODS: tuple[Method, ...] = (
    LoHa(
        name="loha",
        default_ranks=(1, 2, 4, 8, 16),
        learning_rate=(1.5e-3, 5e-2),
        converts_to_lora=True,
        quantized_base=False,  # The update gets its shape from the base weight's.
        transposed_base=False,
        rank_patterns=(("r", "rank_pattern"), ("alpha", "alpha_pattern")),
    ),
)
