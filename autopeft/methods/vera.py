"""VeRA and PVeRA: random matrices shared by all sites, and a few learned vectors each.

Sources: VeRA arXiv 2310.11454; PVeRA, whose inner activations are drawn from a learned
distribution, arXiv 2512.07703.
"""

from __future__ import annotations

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape


class Vera(Method):
    """x -> W x + b * B (d * A x): A and B are random and shared, b starts at zero.

    A and B have the size of the largest site and are cut for the others; they come from a seed and
    are not saved.
    """

    peft_type = "VERA"
    dropout_argument = "vera_dropout"
    fixed_arguments = (("save_projection", False),)

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """The vectors b and d."""
        return shape[0] + rank

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """Two thin products forward; backward through B for d's gradient, A for the input's."""
        out, in_ = shape
        return AdapterFlops(
            forward_per_token=2.0 * rank * (in_ + out),
            backward_per_token=2.0 * rank * out,
            input_grad_per_token=2.0 * rank * in_,
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """A x, for d's gradient, and B's output, for b's."""
        return AdapterMemory(per_token=rank + shape[0], drops_input=True)

    def max_rank(self, shape: Shape) -> int:
        """VeRA's ranks may exceed a module's smaller side."""
        return max(shape)


class Pvera(Vera):
    """x -> W x + b * B z with z ~ N(d1 * A1 x, exp(d2 * A2 x)): A and B are random and shared.

    In evaluation and once merged, z is its mean. A and B come from a seed and are not saved.
    """

    peft_type = "PVERA"
    dropout_argument = "pvera_dropout"

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """The vectors b, d1 and d2."""
        return shape[0] + 2 * rank

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """VeRA's, with A twice as wide."""
        out, in_ = shape
        return AdapterFlops(
            forward_per_token=2.0 * rank * (2 * in_ + out),
            backward_per_token=2.0 * rank * out,
            input_grad_per_token=4.0 * rank * in_,
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """A x, the deviation and the noise; B's output, for b's gradient.

        Deviation and noise are fp32 under bf16 autocast, which rounds A and B at each use.
        """
        out, in_ = shape
        return AdapterMemory(
            per_token=4 * rank + out,
            drops_input=True,
            bf16_per_token=2 * rank,
            bf16_per_step=rank * out,
            bf16_input_grad_per_step=2 * rank * in_,
        )


METHODS: tuple[Method, ...] = (
    Vera(
        name="vera",
        keeps_fp32=True,
        default_ranks=(16, 64, 128, 256, 512),
        learning_rate=(8e-3, 3e-1),
        converts_to_lora=True,
        shared_state=True,
    ),
    Pvera(
        name="pvera",
        default_ranks=(16, 64, 128, 256, 512),
        learning_rate=(2e-3, 8e-2),
        converts_to_lora=True,
        shared_state=True,
        draws_noise=True,
    ),
)
