"""GLoRA: two low-rank matrices, one added to the weight, one multiplied by it (arXiv 2306.07967).

The paper's bias terms are left out: many models have no bias, and the parameters of a site must not
depend on it.
"""

from __future__ import annotations

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape, dense_update_flops


class GLora(Method):
    """x -> (W + W * A + B) x, entry by entry: A and B are low-rank products, zero at the start."""

    peft_type = "GLORA"
    fixed_arguments = (("config_C", "none"), ("config_D_E", "none"))

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """The factors of A and B."""
        return 2 * rank * (shape[0] + shape[1])

    def frozen_floats(self, rank: int, shape: Shape, role: str = "") -> int:
        """Zeros that peft saves in place of the bias terms."""
        return 2 * shape[0] + shape[1]

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """A second full product for each token; each step builds A and B."""
        product = 2.0 * shape[0] * shape[1]
        return dense_update_flops(
            shape,
            # Where there is a bias, peft computes one more product for the absent bias term.
            forward_per_step=2 * rank * product + product,
            backward_per_step=4 * rank * product,
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input; the whole weight where the input needs a gradient."""
        return AdapterMemory(input_grad_per_step=shape[0] * shape[1], keeps_input=True)


METHODS: tuple[Method, ...] = (
    GLora(
        name="glora",
        default_ranks=(1, 2, 4, 8, 16),
        learning_rate=(1.5e-3, 6e-2),
        # The weight is recomputed as a sum, over Conv1D in another memory order.
        exact_start=False,
        quantized_base=False,
        transposed_base=False,
    ),
)
