"""HiRA: a low-rank factor on every entry of the weight (ICLR 2025, openreview TwJrTz9cRS)."""

from __future__ import annotations

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape, dense_update_flops


class Hira(Method):
    """x -> W x + (W * (B A)) x, entry by entry: of high rank; B is zero at the start."""

    peft_type = "HIRA"
    dropout_argument = "hira_dropout"

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """A and B."""
        return rank * (shape[0] + shape[1])

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """A second full product for each token; each step multiplies A and B."""
        product = 2.0 * shape[0] * shape[1]
        return dense_update_flops(
            shape, forward_per_step=rank * product, backward_per_step=2 * rank * product
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input; the update where the input needs a gradient."""
        return AdapterMemory(
            input_grad_per_step=shape[0] * shape[1], keeps_input=True, drops_input=True
        )


METHODS: tuple[Method, ...] = (
    Hira(
        name="hira",
        # The factor multiplies entries far below 1, so it takes larger steps than LoRA's update.
        learning_rate=(4e-3, 1.2e-1),
        # It multiplies the weight, which torchao's 8-bit weights do not support.
        quantized_base=False,
        # No `rank_patterns`: peft 0.21.2 ignores its `rank_pattern` (no upstream issue known).
    ),
)
