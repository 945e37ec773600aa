"""MiSS: one small matrix shared by all shards of a module's input (arXiv 2409.15371)."""

from __future__ import annotations

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape


class Miss(Method):
    """x -> W x + D s(x): s sums the input's shards of size rank; D (rank, out) starts at zero."""

    peft_type = "MISS"
    dropout_argument = "miss_dropout"

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """D."""
        return rank * shape[0]

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """One thin product forward; a gradient each for D and s(x) backward."""
        product = 2.0 * rank * shape[0]
        return AdapterFlops(product, product, product)

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """Only the summed shards; the input is not kept."""
        return AdapterMemory(per_token=rank, drops_input=True)


METHODS: tuple[Method, ...] = (
    Miss(
        name="miss",
        # Each entry of D sees the sum of in / rank inputs, so small rates move it far.
        learning_rate=(5e-5, 2e-3),
        converts_to_lora=True,
        transposed_base=False,
    ),
)
