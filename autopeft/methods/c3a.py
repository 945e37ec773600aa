"""C3A: an update made of circulant blocks (arXiv 2407.19342)."""

from __future__ import annotations

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape


class C3A(Method):
    """x -> W x + C x / in: C has circulant blocks, zero at the start; `rank` is their size.

    Larger blocks have fewer parameters.
    """

    peft_type = "C3A"
    rank_argument = "block_size"
    fixed_arguments = (("init_weights", True),)

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """One row of each block."""
        return shape[0] * shape[1] // rank

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """Products of Fourier coefficients; the transforms are not matrix products."""
        product = 2.0 * shape[0] * shape[1] / rank
        # peft computes the input's gradient even where it is not needed.
        return AdapterFlops(forward_per_token=product, backward_per_token=2 * product)

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input. Backward, complex transforms of the input and of the output's gradient."""
        out, in_ = shape
        return AdapterMemory(keeps_input=True, scratch_per_token=3.0 * in_ + out)

    def is_legal_rank(self, rank: int, shape: Shape) -> bool:
        """Blocks are square and cover the weight."""
        return rank >= 1 and shape[0] % rank == 0 and shape[1] % rank == 0

    def rank_rule(self, shape: Shape) -> str:
        """Return the rule in words."""
        return f"the block size (rank) divides both {shape[0]} and {shape[1]}"


METHODS: tuple[Method, ...] = (
    C3A(
        name="c3a",
        keeps_fp32=True,
        default_ranks=(32, 64, 128, 256, 384, 768),
        # Entries are divided by the input width, so they must grow large.
        learning_rate=(4e-2, 2.0),
        converts_to_lora=False,
        transposed_base=False,
    ),
)
