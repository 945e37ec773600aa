"""IA3: one learned factor for each activation (arXiv 2205.05638)."""

from __future__ import annotations

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape


class Ia3(Method):
    """x -> s * W x; at the feed-forward's second module x -> W (s * x); s starts at one."""

    peft_type = "IA3"
    rank_argument = ""

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """One factor for each scaled activation."""
        return shape[1] if role in self.input_side_roles else shape[0]

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """None counted: scaling is elementwise."""
        return AdapterFlops()

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """What is scaled, for the factors' gradient."""
        if role in self.input_side_roles:
            return AdapterMemory(input_grad_per_step=shape[1], keeps_input=True)
        return AdapterMemory(per_token=shape[0], input_grad_per_step=shape[0])


METHODS: tuple[Method, ...] = (
    Ia3(
        name="ia3",
        default_ranks=(),
        learning_rate=(4e-3, 1e-1),
        input_side_roles=("mlp.down",),
        input_side_argument="feedforward_modules",
    ),
)
