"""LoKr: a Kronecker product of two small matrices (LyCORIS, arXiv 2309.14859)."""

from __future__ import annotations

import math

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape, dense_update_flops


def factors_of(size: int) -> tuple[int, int]:
    """Return the two factors of a size that are closest to each other, the smaller first."""
    small = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return small, size // small


class LoKr(Method):
    """x -> W x + scaling (C kron A B) x: C is full and zero at the start, A B has rank `rank`."""

    peft_type = "LOKR"
    alpha_argument = "alpha"
    dropout_argument = "rank_dropout"  # It acts on the update's rows.
    fixed_arguments = (("rank_dropout_scale", True),)

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """C, A and B."""
        (c_out, b_out), (c_in, b_in) = factors_of(shape[0]), factors_of(shape[1])
        return c_out * c_in + rank * (b_out + b_in)

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """A second full product for each token; each step multiplies A and B."""
        small = 2.0 * rank * factors_of(shape[0])[1] * factors_of(shape[1])[1]
        return dense_update_flops(shape, forward_per_step=small, backward_per_step=2 * small)

    def lora_rank(self, rank: int, shape: Shape) -> int:
        """Return the highest rank of a LoRA that equals it: the product of its factors' ranks."""
        return min(rank * min(factors_of(shape[0])[0], factors_of(shape[1])[0]), *shape[:2])

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input and A B; the update where the input needs a gradient."""
        return AdapterMemory(
            per_step=factors_of(shape[0])[1] * factors_of(shape[1])[1],
            input_grad_per_step=shape[0] * shape[1],
            keeps_input=True,
        )

    def max_rank(self, shape: Shape) -> int:
        """At half the larger factor and above, peft would silently use a full matrix for A B."""
        return (max(factors_of(shape[0])[1], factors_of(shape[1])[1]) - 1) // 2


METHODS: tuple[Method, ...] = (
    LoKr(
        name="lokr",
        default_ranks=(1, 2, 4, 8, 16),
        learning_rate=(2e-3, 7e-2),
        converts_to_lora=True,
        quantized_base=False,  # The update gets its shape from the base weight's.
        transposed_base=False,
        rank_patterns=(("r", "rank_pattern"), ("alpha", "alpha_pattern")),
    ),
)
