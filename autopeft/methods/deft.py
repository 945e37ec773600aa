"""DEFT: a subspace of a module's output is taken out and replaced.

Source: Decompositional Efficient Fine-Tuning for Text-to-Image Models, NeurIPS 2025.
"""

from __future__ import annotations

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape


class Deft(Method):
    """x -> (1 - P relu(P)^T) W x + P R x: P (out, rank) is random, R starts as relu(P)^T W."""

    peft_type = "DEFT"
    alpha_argument = "alpha"
    dropout_argument = "deft_dropout"

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """P and R."""
        return rank * (shape[0] + shape[1])

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """Three thin products with P and one with R; P gets three gradients."""
        out, in_ = shape
        return AdapterFlops(
            forward_per_token=2.0 * rank * (3 * out + in_),
            backward_per_token=2.0 * rank * (5 * out + in_),
            input_grad_per_token=2.0 * rank * (out + in_),
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input, the module's output, and the outputs of the subspace and of R."""
        out, in_ = shape
        return AdapterMemory(
            per_token=out + 2.0 * rank,
            per_step=rank * out,
            input_grad_per_step=rank * in_,
            keeps_input=True,
            drops_input=True,
        )


METHODS: tuple[Method, ...] = (
    Deft(
        name="deft",
        learning_rate=(4e-4, 1.2e-2),
        converts_to_lora=True,
        exact_start=False,  # What is removed and what is added are equal up to rounding.
        quantized_base=False,
    ),
)
