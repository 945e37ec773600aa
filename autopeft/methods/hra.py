"""HRA: a module's input goes through a chain of reflections (arXiv 2405.17484)."""

from __future__ import annotations

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape


class Hra(Method):
    """x -> W H1 .. Hr x: each H reflects at a learned direction; pairs start equal and cancel."""

    peft_type = "HRA"

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """The directions."""
        return rank * shape[1]

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """Only the weight's gradient for each token; each step recomputes the weight."""
        out, in_ = shape
        chain = 4.0 * rank * in_**2
        weight = 2.0 * in_**3 + 2.0 * out * in_**2
        return AdapterFlops(
            backward_per_token=2.0 * out * in_,
            forward_per_step=chain + weight,
            # The first reflection acts on a constant.
            backward_per_step=2 * chain - 2.0 * in_**2 + weight,
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input; a matrix for each reflection and the constant it starts from."""
        out, in_ = shape
        return AdapterMemory(
            per_step=(rank + 1.0) * in_**2 + 2.0 * rank * in_,
            input_grad_per_step=out * in_,
            keeps_input=True,
        )

    def is_legal_rank(self, rank: int, shape: Shape) -> bool:
        """Reflections come in pairs, which start as the identity."""
        return 2 <= rank <= min(shape) and rank % 2 == 0

    def rank_rule(self, shape: Shape) -> str:
        """Return the rule in words."""
        return f"the number of reflections (rank) is even and from 2 to {min(shape)}"


METHODS: tuple[Method, ...] = (
    Hra(
        name="hra",
        default_ranks=(2, 4, 8, 16, 32),
        learning_rate=(8e-3, 3e-1),
        # W H - W = W (H - 1), and H differs from 1 by `rank` directions.
        converts_to_lora=True,
        exact_start=False,  # Two equal reflections cancel up to rounding.
        quantized_base=False,
        transposed_base=False,
    ),
)
