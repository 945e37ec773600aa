"""The LoRA family: a low-rank update beside a linear module.

Sources: LoRA arXiv 2106.09685, DoRA arXiv 2402.09353, rsLoRA arXiv 2312.03732, LoRA-FA arXiv
2308.03303, PiSSA arXiv 2404.02948, OLoRA arXiv 2406.01775.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from autopeft.methods.base import (
    EXPERT_ROLES,
    LINEAR_ROLES,
    AdapterFlops,
    AdapterMemory,
    Method,
    Shape,
    low_rank_flops,
)
from autopeft.plan import TrainSettings


@dataclass(frozen=True)
class Lora(Method):
    """x -> W x + scaling B A x, with A (rank, in) random and B (out, rank) zero at the start."""

    peft_type = "LORA"
    alpha_argument = "lora_alpha"
    dropout_argument = "lora_dropout"
    use_rslora: bool = False

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """A and B."""
        return rank * (shape[0] + shape[1])

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """Two thin products forward; a gradient each for B, A x, A and x backward."""
        return low_rank_flops(rank, shape)

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """The input, for A's gradient, and A x, for B's."""
        return AdapterMemory(per_token=rank, keeps_input=True, drops_input=True)

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Return the arguments, with a whole alpha where it is one: other tools expect that."""
        config = super().peft_config(rank, train)
        if float(config["lora_alpha"]).is_integer():
            config["lora_alpha"] = int(config["lora_alpha"])
        return {**config, "use_rslora": True} if self.use_rslora else config


class ExpertLora(Lora):
    """LoRA, also of experts: each has an A and a B of its own.

    peft adds all of B A to the experts' weights in each step, whichever experts the tokens go to.
    """

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """A and B, of each expert."""
        return super().n_params(rank, shape, role) * (shape[2] if role in EXPERT_ROLES else 1)

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """Of experts: B A, twice as torch checks it, and the gradients of the sum, of A and B."""
        if role not in EXPERT_ROLES:
            return super().flops(rank, shape, role)
        out, in_, n_experts = shape
        product = 2.0 * rank * out * in_ * n_experts
        return AdapterFlops(
            backward_per_token=2.0 * out * in_,
            forward_per_step=2 * product,
            backward_per_step=2 * product,
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """Of experts: the input, the sum where the input needs a gradient, the sum's gradient."""
        if role not in EXPERT_ROLES:
            return super().memory(rank, shape, role)
        out, in_, n_experts = shape
        size = float(out * in_ * n_experts)
        return AdapterMemory(input_grad_per_step=size, keeps_input=True, scratch_per_step=size)


class Dora(Lora):
    """LoRA with the updated weight rescaled row by row to a learned magnitude."""

    fixed_arguments = (("use_dora", True),)

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """LoRA's, and one magnitude for each output."""
        return super().n_params(rank, shape, role) + shape[0]

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """LoRA's, and the product B A that the norm of the updated weight needs at each step."""
        out, in_ = shape
        return replace(
            super().flops(rank, shape, role),
            # peft multiplies A, then B, with an identity matrix of size `in`.
            forward_per_step=2.0 * rank * in_ * (in_ + out),
            # With dropout the module's output cannot be reused.
            dropout_forward_per_token=2.0 * in_ * out,
            dropout_input_grad_per_token=2.0 * in_ * out,
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """LoRA's, and the module's output and the update for the magnitude's gradient."""
        return AdapterMemory(
            per_token=rank + 2.0 * shape[0],
            per_step=2.0 * shape[0],
            keeps_input=True,
            drops_input=True,
        )


class LoraFa(Lora):
    """LoRA with a frozen random A: only B is trained, and the input need not be kept."""

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """B."""
        return rank * shape[0]

    def frozen_floats(self, rank: int, shape: Shape, role: str = "") -> int:
        """A."""
        return rank * shape[1]

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """Two thin products forward; B's gradient backward, and its projection once a step."""
        out, in_ = shape
        return AdapterFlops(
            forward_per_token=2.0 * rank * (in_ + out),
            backward_per_token=2.0 * rank * out,
            input_grad_per_token=2.0 * rank * (in_ + out),
            backward_per_step=2.0 * rank * rank * out,
        )

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """A x, for B's gradient."""
        return AdapterMemory(per_token=rank, drops_input=True)


@dataclass(frozen=True)
class StartedLora(Lora):
    """LoRA with A and B taken from a factorization of the weight and subtracted from it."""

    init: str = ""

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `LoraConfig`."""
        return {**super().peft_config(rank, train), "init_lora_weights": self.init}


_RANK_PATTERNS = (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))


METHODS: tuple[Method, ...] = (
    ExpertLora(
        name="lora",
        roles=(*LINEAR_ROLES, *EXPERT_ROLES),
        learning_rate=(2e-4, 1e-2),
        converts_to_lora=True,
        rank_patterns=_RANK_PATTERNS,
        holds_lora_factors=True,
        can_cut_rank=True,
    ),
    Dora(
        name="dora",
        learning_rate=(2e-4, 1e-2),
        exact_start=False,  # The magnitude is divided by a norm that is recomputed.
        rank_patterns=_RANK_PATTERNS,
    ),
    Lora(
        name="rslora",
        learning_rate=(1e-4, 1e-2),
        converts_to_lora=True,
        rank_patterns=_RANK_PATTERNS,
        use_rslora=True,
        holds_lora_factors=True,
        can_cut_rank=True,
    ),
    LoraFa(
        name="lora_fa",
        learning_rate=(2e-3, 6e-2),
        converts_to_lora=True,
        rank_patterns=_RANK_PATTERNS,
        holds_lora_factors=True,
    ),
    StartedLora(
        name="pissa",
        learning_rate=(2e-4, 8e-3),
        converts_to_lora=True,
        rank_patterns=_RANK_PATTERNS,
        exact_start=False,
        changes_base=True,
        quantized_base=False,
        init="pissa",
    ),
    StartedLora(
        name="olora",
        learning_rate=(2e-4, 8e-3),
        converts_to_lora=True,
        rank_patterns=_RANK_PATTERNS,
        exact_start=False,
        changes_base=True,
        quantized_base=False,
        init="olora",
    ),
)
