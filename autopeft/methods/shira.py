"""SHiRA: some entries of a weight, drawn at random, are trained (arXiv 2406.13175)."""

from __future__ import annotations

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape


class Shira(Method):
    """x -> (W + S) x: S is sparse, zero at the start, with as many entries as a LoRA's."""

    peft_type = "SHIRA"

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """As many as in LoRA's A and B."""
        return rank * (shape[0] + shape[1])

    def frozen_floats(self, rank: int, shape: Shape, role: str = "") -> int:
        """Row and column of each entry."""
        return 2 * self.n_params(rank, shape, role)

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """The gradient of the whole weight, though only a few entries are used."""
        return AdapterFlops(backward_per_token=2.0 * shape[0] * shape[1])

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input, the entries and their indices; the weight where the input needs a gradient."""
        return AdapterMemory(
            per_step=5.0 * self.n_params(rank, shape, role),
            input_grad_per_step=shape[0] * shape[1],
            keeps_input=True,
        )

    def max_rank(self, shape: Shape) -> int:
        """The weight must have that many entries."""
        return shape[0] * shape[1] // sum(shape)


METHODS: tuple[Method, ...] = (
    Shira(name="shira", learning_rate=(1.5e-3, 6e-2), quantized_base=False, transposed_base=False),
)
