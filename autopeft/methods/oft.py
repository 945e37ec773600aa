"""OFT: a block-diagonal rotation of a module's input (arXiv 2306.07280, 2506.19847)."""

from __future__ import annotations

from autopeft.methods.base import LINEAR_ROLES, AdapterFlops, AdapterMemory, Method, Shape


class Oft(Method):
    """x -> W R x: R has orthogonal blocks by a truncated Cayley series; `rank` is their size."""

    peft_type = "OFT"
    rank_argument = "oft_block_size"
    dropout_argument = "module_dropout"
    fixed_arguments = (("r", 0), ("use_cayley_neumann", True))

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """The upper triangle of each block."""
        return shape[1] // rank * (rank * (rank - 1) // 2)

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """The rotation for each token; three block products of the series for each step."""
        rotation = 2.0 * shape[1] * rank
        series = 6.0 * shape[1] * rank**2
        return AdapterFlops(
            forward_per_token=rotation,
            backward_per_token=rotation,
            input_grad_per_token=rotation,
            forward_per_step=series,
            backward_per_step=2.0 * series,
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input, the rotation, and the first three powers in the series."""
        matrices = 1.0 * shape[1] * rank
        return AdapterMemory(
            per_step=3.0 * matrices, input_grad_per_step=matrices, keeps_input=True
        )

    def is_legal_rank(self, rank: int, shape: Shape) -> bool:
        """Blocks of at least 2 must divide the input width; peft would change other sizes."""
        return 2 <= rank <= shape[1] and shape[1] % rank == 0

    def rank_rule(self, shape: Shape) -> str:
        """Return the rule in words."""
        return f"the block size (rank) is at least 2 and divides the input width {shape[1]}"


METHODS: tuple[Method, ...] = (
    Oft(
        name="oft",
        default_ranks=(2, 4, 8, 16, 32),
        learning_rate=(7e-4, 2e-2),
        transposed_base=False,
        input_side_roles=LINEAR_ROLES,
    ),
)
