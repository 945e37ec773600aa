"""BEFT: a bias beside a module, trained alone (arXiv 2509.15974)."""

from __future__ import annotations

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape


class Beft(Method):
    """y -> y + b: b starts at zero."""

    peft_type = "BEFT"
    rank_argument = ""

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """One number for each output."""
        return shape[0]

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """None: a sum is no matrix product."""
        return AdapterFlops()

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """Nothing is kept for a sum."""
        return AdapterMemory()


METHODS: tuple[Method, ...] = (
    Beft(
        name="beft",
        default_ranks=(),
        learning_rate=(1.5e-3, 5e-2),
        # It cannot be merged into a module without a bias, as in most decoders.
        mergeable=False,
        transposed_base=False,
    ),
)
