"""The base class of all adapter methods: where one can be placed, at which ranks, and its costs.

Formulas are for one site. `shape` is (out, in) of the adapted linear module. At a role of experts
it is (out, in, experts), and a token counts once for each expert that it goes to. At the role
"norm" it is (width, number of vectors), so that the product counts the normalizations' parameters;
at "attn" (heads, total width of the heads); at "model" (most virtual tokens, width of the
embeddings).
A FLOP is one multiplication or one addition of a matrix product; elementwise work is not counted
(as in `torch.utils.flop_counter`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from autopeft.plan import TrainSettings

Shape = tuple[int, ...]

LINEAR_ROLES: tuple[str, ...] = (
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.qkv",
    "attn.q_a",
    "attn.q_b",
    "attn.kv_a",
    "attn.kv_b",
    "attn.o",
    "cross.q",
    "cross.k",
    "cross.v",
    "cross.o",
    "mlp.up",
    "mlp.gate",
    "mlp.gate_up",
    "mlp.down",
)
"""Roles that are one linear module each."""

EXPERT_ROLES: tuple[str, ...] = ("experts.gate_up", "experts.up", "experts.down")
"""Roles that are one parameter each, of shape (experts, out, in) or (experts, in, out)."""


@dataclass(frozen=True)
class AdapterFlops:
    """FLOPs one adapter adds at one site.

    Attributes:
        forward_per_token: In the forward pass, for each token.
        backward_per_token: In the backward pass, for each token, without `input_grad_per_token`.
        input_grad_per_token: In the backward pass, where the site's input needs a gradient.
        forward_per_step: In the forward pass, independent of the number of tokens.
        backward_per_step: In the backward pass, independent of the number of tokens.
        dropout_forward_per_token: Added to `forward_per_token` with dropout.
        dropout_input_grad_per_token: Added to `input_grad_per_token` with dropout.
    """

    forward_per_token: float = 0.0
    backward_per_token: float = 0.0
    input_grad_per_token: float = 0.0
    forward_per_step: float = 0.0
    backward_per_step: float = 0.0
    dropout_forward_per_token: float = 0.0
    dropout_input_grad_per_token: float = 0.0


@dataclass(frozen=True)
class AdapterMemory:
    """Floats that one adapter keeps at one site from the forward pass for the backward pass.

    Attributes:
        per_token: For each token, without the site's input.
        dropout_per_token: For each token, added with dropout.
        per_step: Independent of the number of tokens.
        input_grad_per_step: The same, where the site's input needs a gradient.
        keeps_input: Whether the site's input is kept; sites that read one tensor keep it once.
        drops_input: Whether dropout makes a copy of the input, which each site keeps instead of the
            input, and a mask, which is kept where the input needs a gradient.
        scratch_per_step: What the backward pass through the site holds for a moment, on top.
        scratch_per_token: The same, for each token.
        bf16_per_token: For each token, added under bf16 autocast.
        bf16_per_step: Independent of the number of tokens, added under bf16 autocast: it keeps
            rounded copies of frozen tensors.
        bf16_input_grad_per_step: The same, where the site's input needs a gradient.
    """

    per_token: float = 0.0
    per_step: float = 0.0
    input_grad_per_step: float = 0.0
    keeps_input: bool = False
    drops_input: bool = False
    dropout_per_token: float = 0.0
    scratch_per_step: float = 0.0
    scratch_per_token: float = 0.0
    bf16_per_token: float = 0.0
    bf16_per_step: float = 0.0
    bf16_input_grad_per_step: float = 0.0


@dataclass(frozen=True)
class Method(ABC):
    """One adapter method: its capabilities, its cost formulas and its peft configuration.

    Attributes:
        name: Its name in plans, spaces and files.
        roles: Roles where it can be placed.
        default_ranks: Ranks that a space searches by default; () if the method has no rank.
        min_rank: The lowest rank.
        learning_rate: (low, high) of the range worth searching, for AdamW, log-uniform; set around
            the best of a sweep on a small encoder (75 steps) and extended downwards for larger
            models.
        mergeable: Whether it can be merged into the base weights.
        converts_to_lora: Whether it can be written exactly as a LoRA.
        shared_state: Whether its sites share parameters or frozen random matrices.
        starts_at_identity: Whether attaching it keeps the model's outputs.
        exact_start: True if it keeps them bit for bit, False if up to rounding.
        changes_base: Whether peft rewrites the adapted module's own weight; the module is then
            copied, so that the base model stays as it is.
        quantized_base: Whether it works over a 4-bit or 8-bit base model.
        transposed_base: Whether peft itself can load it over modules that store their weight as
            (in, out), GPT-2's Conv1D; autopeft can load any method there.
        draws_noise: Whether its output is random in training, apart from dropout.
        keeps_fp32: Whether it computes in fp32 under bf16 autocast too.
        input_side_roles: Roles where it changes the module's input instead of its output.
        input_side_argument: Argument of peft's configuration that lists the modules at these roles;
            "" if peft does not ask.
        holds_lora_factors: Whether its layers are plain LoRA layers over the unchanged base weight.
        can_cut_rank: Whether a trained adapter can be cut to any lower rank without training.
        rank_patterns: (argument, pattern) pairs: arguments of peft's configuration that depend on
            the rank, and peft's name for their values by module; () if one configuration holds one
            rank only.
        version: Raised when the meaning of saved files changes.
        peft_type: Its name in peft; this and what follows belong to a class, for `peft_config`.
        rank_argument: Argument of peft's configuration for the rank; "" if there is none.
        alpha_argument: The same for alpha.
        dropout_argument: The same for dropout.
        fixed_arguments: (argument, value) pairs of peft's configuration that never change.
    """

    peft_type: ClassVar[str] = ""
    rank_argument: ClassVar[str] = "r"
    alpha_argument: ClassVar[str] = ""
    dropout_argument: ClassVar[str] = ""
    fixed_arguments: ClassVar[tuple[tuple[str, Any], ...]] = ()

    name: str
    learning_rate: tuple[float, float]
    roles: tuple[str, ...] = LINEAR_ROLES
    default_ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    min_rank: int = 1
    mergeable: bool = True
    converts_to_lora: bool = False
    shared_state: bool = False
    starts_at_identity: bool = True
    exact_start: bool = True
    changes_base: bool = False
    quantized_base: bool = True
    transposed_base: bool = True
    draws_noise: bool = False
    keeps_fp32: bool = False
    input_side_roles: tuple[str, ...] = ()
    input_side_argument: str = ""
    holds_lora_factors: bool = False
    can_cut_rank: bool = False
    rank_patterns: tuple[tuple[str, str], ...] = ()
    version: int = 1

    @property
    def takes_rank(self) -> bool:
        """Whether `LayerSpec.rank` is its size (at least 1); if not, rank must be 0."""
        return bool(self.default_ranks)

    @property
    def rank_pattern(self) -> bool:
        """Whether one peft configuration can hold several ranks."""
        return bool(self.rank_patterns)

    @abstractmethod
    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """Return the exact number of trainable parameters that belong to one site alone."""

    def pool(self, shape: Shape) -> int:
        """Return a number that is equal for sites of one rank that share state.

        Methods whose sites share state at any shape have one pool, 0.
        """
        return 0

    def shared_params(self, rank: int, pool: int = 0) -> int:
        """Return the trainable parameters that all sites of one rank and pool share."""
        return 0

    def frozen_floats(self, rank: int, shape: Shape, role: str = "") -> int:
        """Return how many numbers are saved for one site besides the trained ones."""
        return 0

    def held_floats(self, rank: int, shape: Shape, role: str = "") -> int:
        """Return how many numbers an attached site holds in memory besides the trained ones."""
        copied = shape[0] * shape[1] if self.changes_base else 0
        return copied + self.frozen_floats(rank, shape, role)

    @abstractmethod
    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """Return the FLOPs at one site."""

    @abstractmethod
    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """Return what one site keeps for the backward pass."""

    def __post_init__(self) -> None:
        if not self.peft_type and type(self).peft_config is Method.peft_config:
            raise TypeError(f"{type(self).__name__} must set peft_type or define peft_config")

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Return keyword arguments of peft's configuration, without `target_modules`."""
        given = (
            (self.rank_argument, rank),
            (self.alpha_argument, train.alpha_for(rank)),
            (self.dropout_argument, train.dropout),
        )
        arguments = {argument: value for argument, value in given if argument}
        return {"peft_type": self.peft_type, **arguments, **dict(self.fixed_arguments)}

    def pool_config(self, pool: int) -> dict[str, Any]:
        """Return further arguments for sites of one pool."""
        return {}

    def lora_rank(self, rank: int, shape: Shape) -> int:
        """Return the highest rank of a LoRA that equals it, if it `converts_to_lora`."""
        # What starts from parts of the weight also takes these away.
        return min(rank * (2 if self.changes_base else 1), *shape[:2])

    def max_rank(self, shape: Shape) -> int:
        """Return the highest rank at a site of that shape."""
        return min(shape[:2])

    def is_legal_rank(self, rank: int, shape: Shape) -> bool:
        """Return whether a site of that shape can have that rank."""
        if not self.takes_rank:
            return rank == 0
        return self.min_rank <= rank <= self.max_rank(shape)

    def rank_rule(self, shape: Shape) -> str:
        """Return the condition of `is_legal_rank` in words, for error messages."""
        if not self.takes_rank:
            return "`rank == 0` must hold"
        return f"`{self.min_rank} <= rank <= {self.max_rank(shape)}` must hold"

    def peft_config_for(self, ranks: Mapping[str, int], train: TrainSettings) -> dict[str, Any]:
        """Return `peft_config` for modules of several ranks; the most common one is the default.

        Args:
            ranks: Module name -> rank; all equal unless the method has `rank_patterns`.
            train: Gives dropout and alpha.
        """
        if not self.rank_pattern:
            (rank,) = set(ranks.values())
            return self.peft_config(rank, train)
        counts = sorted(ranks.values())
        commonest = max(sorted(set(counts)), key=counts.count)
        config = self.peft_config(commonest, train)
        others = {name: rank for name, rank in sorted(ranks.items()) if rank != commonest}
        for argument, pattern in self.rank_patterns if others else ():
            values = {
                name: self.peft_config(rank, train)[argument] for name, rank in others.items()
            }
            # A constant alpha needs no pattern: some servers do not read it.
            if unlike := {n: value for n, value in values.items() if value != config[argument]}:
                config[pattern] = unlike
        return config


def low_rank_flops(rank: int, shape: Shape) -> AdapterFlops:
    """Return the FLOPs of B A x with both trained: 2 products forward, 4 gradients backward."""
    out, in_ = shape
    return AdapterFlops(
        forward_per_token=2.0 * rank * (in_ + out),
        backward_per_token=2.0 * rank * (2 * out + in_),
        input_grad_per_token=2.0 * rank * in_,
    )


def dense_update_flops(
    shape: Shape, forward_per_step: float = 0.0, backward_per_step: float = 0.0
) -> AdapterFlops:
    """Return the FLOPs of (dW) x beside W x: a full product forward and for each gradient.

    Each step also builds dW, and computes the gradients of its factors.
    """
    product = 2.0 * shape[0] * shape[1]
    return AdapterFlops(product, product, product, forward_per_step, backward_per_step)
