"""An adapter method: LoRA whose A starts Gaussian, on attention alone."""

from dataclasses import dataclass
from typing import Any

from autopeft import TrainSettings
from autopeft.methods import AdapterFlops, AdapterMemory, Method


@dataclass(frozen=True)
class GaussianLora(Method):
    """x -> W x + scaling B A x, with A (rank, in) Gaussian and B (out, rank) zero at the start."""

    # What peft calls the method, and its arguments.
    peft_type = "LORA"
    alpha_argument = "lora_alpha"
    dropout_argument = "lora_dropout"

    # What autopeft knows of it.
    name: str = "gaussian_lora"
    learning_rate: tuple[float, float] = (2e-4, 1e-2)
    roles: tuple[str, ...] = ("attn.q", "attn.k", "attn.v", "attn.o")
    default_ranks: tuple[int, ...] = (1, 2, 4, 8)

    def n_params(self, rank: int, shape: tuple[int, ...], role: str = "") -> int:
        """Count A and B at a module of shape (out, in)."""
        return rank * (shape[0] + shape[1])

    def flops(self, rank: int, shape: tuple[int, ...], role: str = "") -> AdapterFlops:
        """Count two thin products forward, and the gradients of B, of A x and of A backward."""
        out, in_ = shape
        return AdapterFlops(
            forward_per_token=2.0 * rank * (in_ + out),
            backward_per_token=2.0 * rank * (2 * out + in_),
            input_grad_per_token=2.0 * rank * in_,
        )

    def memory(self, rank: int, shape: tuple[int, ...], role: str = "") -> AdapterMemory:
        """Count the input, for A's gradient, and A x, for B's."""
        return AdapterMemory(per_token=rank, keeps_input=True, drops_input=True)

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Return the arguments of peft's configuration."""
        return {**super().peft_config(rank, train), "init_lora_weights": "gaussian"}
