"""What every adapter method tells about itself: where it can sit, how big it may be, what it costs.

Formulas count per site. `shape` is always (out, in) of the adapted linear module; at the role
"norm" it is (width, number of vectors), so that the product counts the normalizations' parameters;
at the role "attn" it is (heads, their width together); at the role "model" it is (tokens there is
room for, width of the embeddings).
A FLOP is one multiplication or one addition of a matrix product; elementwise work is not counted
(as in `torch.utils.flop_counter`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autopeft.plan import TrainSettings

Shape = tuple[int, int]

LINEAR_ROLES: tuple[str, ...] = (
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.qkv",
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
"""The roles that are one linear module each."""


@dataclass(frozen=True)
class AdapterFlops:
    """FLOPs one adapter adds at one site.

    Attributes:
        forward_per_token: In the forward pass, for each token.
        backward_per_token: In the backward pass, for each token, without `input_grad_per_token`.
        input_grad_per_token: In the backward pass, only where the site's input needs a gradient.
        forward_per_step: In the forward pass, whatever the number of tokens.
        backward_per_step: In the backward pass, whatever the number of tokens.
        dropout_forward_per_token: In the forward pass, for each token, only where there is dropout.
        dropout_input_grad_per_token: As `input_grad_per_token`, only where there is dropout.
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
    """Numbers one adapter keeps at one site from the forward pass for the backward pass.

    Attributes:
        per_token: Floats for each token, the site's input not counted.
        dropout_per_token: Floats for each token, only where there is dropout.
        per_step: Floats whatever the number of tokens.
        input_grad_per_step: The same, only where the site's input needs a gradient.
        keeps_input: True if the site's input is kept; sites that read one tensor keep it once.
        drops_input: True if dropout makes a copy of the input (kept in its stead, by each site) and
            a mask (kept where the input needs a gradient).
    """

    per_token: float = 0.0
    per_step: float = 0.0
    input_grad_per_step: float = 0.0
    keeps_input: bool = False
    drops_input: bool = False
    dropout_per_token: float = 0.0


@dataclass(frozen=True)
class Method(ABC):
    """One adapter method: its capabilities, its formulas and its peft configuration.

    Attributes:
        name: As written in plans, spaces and files.
        roles: Roles it can sit at.
        default_ranks: Sizes a space draws from unless told otherwise; () if it has no size.
        learning_rate: (low, high) of the range worth searching, for AdamW, log-uniform; set around
            the best of a sweep on a small encoder (75 steps), with room below for larger models.
        mergeable: True if it can be folded into the base weights.
        converts_to_lora: True if it can be written exactly as a LoRA.
        shared_state: True if its sites share parameters, or frozen random matrices.
        starts_at_identity: True if attaching it leaves the model's outputs as they are.
        exact_start: True if it leaves them bit for bit, False if up to rounding.
        changes_base: True if peft rewrites the adapted module's own weight; it then gets a copy, so
            that the base model stays as it is.
        quantized_base: True if it works over a 4-bit or 8-bit base.
        transposed_base: True if peft itself can load it over modules that store their weight as
            (in, out), GPT-2's Conv1D; autopeft can load any.
        draws_noise: True if its output is random in training, dropout apart.
        input_side_roles: Roles where it changes the module's input rather than its output.
        input_side_argument: Argument of peft's configuration that lists the modules at these roles;
            "" if peft does not ask.
        holds_lora_factors: True if its layers are plain LoRA layers over the unchanged base weight.
        can_cut_rank: True if a trained adapter can be cut to a lower rank without training.
        rank_patterns: Arguments of peft's configuration that depend on the rank, each with peft's
            name for its values module by module; () if one configuration holds one rank only.
        version: Raised when saved files change meaning.
    """

    name: str
    learning_rate: tuple[float, float]
    roles: tuple[str, ...] = LINEAR_ROLES
    default_ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    mergeable: bool = True
    converts_to_lora: bool = False
    shared_state: bool = False
    starts_at_identity: bool = True
    exact_start: bool = True
    changes_base: bool = False
    quantized_base: bool = True
    transposed_base: bool = True
    draws_noise: bool = False
    input_side_roles: tuple[str, ...] = ()
    input_side_argument: str = ""
    holds_lora_factors: bool = False
    can_cut_rank: bool = False
    rank_patterns: tuple[tuple[str, str], ...] = ()
    version: int = 1

    @property
    def takes_rank(self) -> bool:
        """True if `LayerSpec.rank` is its size (at least 1), False if rank must be 0."""
        return bool(self.default_ranks)

    @property
    def rank_pattern(self) -> bool:
        """True if one peft configuration can hold several ranks."""
        return bool(self.rank_patterns)

    @abstractmethod
    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """Trainable parameters at one site that no other shares: exact."""

    def pool(self, shape: Shape) -> int:
        """Sites of one size share state only where this is equal: what peft can adapt together.

        A method whose sites share whatever their shapes has one pool, 0.
        """
        return 0

    def shared_params(self, rank: int, pool: int = 0) -> int:
        """Trainable parameters that all sites of one size and pool share, counted once for all."""
        return 0

    def frozen_floats(self, rank: int, shape: Shape, role: str = "") -> int:
        """Numbers that are saved for one site besides the trained ones."""
        return 0

    def held_floats(self, rank: int, shape: Shape, role: str = "") -> int:
        """Numbers one site holds in memory besides the trained ones, as long as it is attached."""
        copied = shape[0] * shape[1] if self.changes_base else 0
        return copied + self.frozen_floats(rank, shape, role)

    @abstractmethod
    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """FLOPs at one site."""

    @abstractmethod
    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """What one site keeps for the backward pass."""

    @abstractmethod
    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Plain keyword arguments of peft's configuration, without `target_modules`."""

    def pool_config(self, pool: int) -> dict[str, Any]:
        """Further arguments, for sites of one pool."""
        return {}

    def is_legal_rank(self, rank: int, shape: Shape) -> bool:
        """True if a site of that shape can hold that size."""
        return 1 <= rank <= min(shape) if self.takes_rank else rank == 0

    def rank_rule(self, shape: Shape) -> str:
        """What `is_legal_rank` asks for, in words, for error messages."""
        return (
            f"`1 <= rank <= {min(shape)}` must hold" if self.takes_rank else "`rank == 0` must hold"
        )

    def peft_config_for(self, ranks: Mapping[str, int], train: TrainSettings) -> dict[str, Any]:
        """Like `peft_config`, for modules of several ranks at once: the commonest is the default.

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
            config[pattern] = {
                name: self.peft_config(rank, train)[argument] for name, rank in others.items()
            }
        return config


def low_rank_flops(rank: int, shape: Shape) -> AdapterFlops:
    """B A x, both trained: two thin products forward; a gradient each for B, A x, A, x backward."""
    out, in_ = shape
    return AdapterFlops(
        forward_per_token=2.0 * rank * (in_ + out),
        backward_per_token=2.0 * rank * (2 * out + in_),
        input_grad_per_token=2.0 * rank * in_,
    )


def dense_update_flops(
    shape: Shape, forward_per_step: float = 0.0, backward_per_step: float = 0.0
) -> AdapterFlops:
    """(dW) x beside W x: a second full product for each token, forward and for each gradient.

    Args:
        shape: The module's.
        forward_per_step: FLOPs of building dW.
        backward_per_step: FLOPs of the gradients of what it is built from.
    """
    product = 2.0 * shape[0] * shape[1]
    return AdapterFlops(product, product, product, forward_per_step, backward_per_step)
