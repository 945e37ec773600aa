"""LN tuning: a block's own normalizations are trained (arXiv 2312.11420)."""

from __future__ import annotations

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape


class LnTuning(Method):
    """Trains copies of the weights (and biases) of every normalization in a block."""

    peft_type = "LN_TUNING"
    rank_argument = ""

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """All parameters of the normalizations."""
        return shape[0] * shape[1]

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """None counted: a normalization has no matrix product."""
        return AdapterFlops()

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The normalized activations, where the normalization does not keep them anyway."""
        return AdapterMemory(keeps_input=True)


METHODS: tuple[Method, ...] = (
    LnTuning(name="ln_tuning", roles=("norm",), default_ranks=(), learning_rate=(1.5e-3, 4e-2)),
)
