"""PEANuT: a small network turns a weight into its own update (arXiv 2410.01870)."""

from __future__ import annotations

from typing import Any

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape, dense_update_flops
from autopeft.plan import TrainSettings


class Peanut(Method):
    """x -> (W + B relu(A W)) x: A (rank, out) is random, B (out, rank) zero at the start."""

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """A and B."""
        return 2 * rank * shape[0]

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """A second full product for each token; two thin ones with the weight for each step."""
        product = 2.0 * shape[0] * shape[1]
        return dense_update_flops(
            shape, forward_per_step=2 * rank * product, backward_per_step=3 * rank * product
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input and relu(A W); the update where the input needs a gradient."""
        out, in_ = shape
        return AdapterMemory(per_step=rank * in_, input_grad_per_step=out * in_, keeps_input=True)

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `PeanutConfig`; it has no dropout and scales by alpha / rank."""
        return {"peft_type": "PEANUT", "r": rank, "scaling": train.alpha_ratio}


METHODS: tuple[Method, ...] = (
    Peanut(
        name="peanut",
        learning_rate=(5e-4, 1.5e-2),
        converts_to_lora=True,
        quantized_base=False,
        transposed_base=False,
    ),
)
