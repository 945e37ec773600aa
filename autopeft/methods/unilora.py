"""Uni-LoRA: the entries of all LoRAs are copies of the numbers in one vector (arXiv 2506.00799)."""

from __future__ import annotations

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape, low_rank_flops

_UNILORA_RANK = 4
"""Rank of the LoRAs; the paper's."""


class UniLora(Method):
    """x -> W x + B A x: every entry of A and B is one of `rank` learned numbers, scaled.

    The assignment comes from a seed and is not saved.
    """

    peft_type = "UNILORA"
    rank_argument = "theta_d_length"
    dropout_argument = "unilora_dropout"
    fixed_arguments = (("r", _UNILORA_RANK),)

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """None: a site has no parameters of its own."""
        return 0

    def shared_params(self, rank: int, pool: int = 0) -> int:
        """The vector."""
        return rank

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """LoRA's."""
        return low_rank_flops(_UNILORA_RANK, shape)

    def lora_rank(self, rank: int, shape: Shape) -> int:
        """Return the highest rank of a LoRA that equals it."""
        return min(_UNILORA_RANK, *shape[:2])

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """LoRA's, and B; A where the input needs a gradient: both are made at each step."""
        out, in_ = shape
        return AdapterMemory(
            per_token=_UNILORA_RANK,
            per_step=_UNILORA_RANK * out,
            input_grad_per_step=_UNILORA_RANK * in_,
            keeps_input=True,
            drops_input=True,
        )

    def max_rank(self, shape: Shape) -> int:
        """With more numbers than one site has entries, some might be unused."""
        return _UNILORA_RANK * sum(shape)


METHODS: tuple[Method, ...] = (
    UniLora(
        name="unilora",
        default_ranks=(64, 256, 1024, 2048, 4096),
        learning_rate=(8e-3, 3e-1),
        converts_to_lora=True,
        shared_state=True,
        # With a vector of zeros neither A nor B would get a gradient.
        starts_at_identity=False,
        exact_start=False,
        quantized_base=False,  # peft stores the scales in the type of the base weight.
    ),
)
