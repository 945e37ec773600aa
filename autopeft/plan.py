"""AdapterPlan (which adapter at which site), TrainSettings, and both together: Candidate."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from autopeft.errors import SpaceError
from autopeft.utils.serialize import from_plain, to_float, to_plain

MODEL = "model"
"""The role of an adapter on the whole model; a plan has at most one, at layer 0."""

ROLES: tuple[str, ...] = (
    MODEL,  # before any block: prompts
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.qkv",  # models that fuse the three (GPT-2, GPT-NeoX, Phi-3)
    "attn.q_a",  # latent attention (DeepSeek-V3): down to the latent vectors (a), up to heads (b)
    "attn.q_b",
    "attn.kv_a",
    "attn.kv_b",
    "attn.o",
    "attn",  # a self-attention as a whole: prefixes
    "cross.q",  # a decoder's attention over the encoder (T5, Whisper)
    "cross.k",
    "cross.v",
    "cross.o",
    "mlp.up",
    "mlp.gate",
    "mlp.gate_up",  # models that fuse the two (Phi-3)
    "mlp.down",
    "experts.gate_up",  # the experts of a block, each of their weights one tensor of all (Mixtral)
    "experts.up",  # experts without a gate
    "experts.down",
    "norm",  # every normalization inside one block, together
    "block",  # the block as a whole
)
"""The roles of sites, in the order of the forward pass."""

MAX_LAYERS = 1_000
"""No model has more blocks. Plans come from files of others, and a page has a row for each."""

MAX_RANK = 10_000_000
"""No method has a larger size; UniLoRA's and VB-LoRA's are the largest."""

_REPAIR = "restore the file that holds it"


def _digest(value: object) -> str:
    """Return the first 16 hex digits of the SHA-256 of the canonical JSON."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True, order=True)
class LayerSpec:
    """One adapter at one site.

    Attributes:
        layer: Index of the block, from 0.
        role: One of `ROLES`.
        method: Name of a method, see `autopeft methods`.
        rank: The rank, or the method's own size (OFT: block size); 0 if it has none.

    Example:
        >>> LayerSpec(0, "attn.q", "lora", rank=8)
        LayerSpec(layer=0, role='attn.q', method='lora', rank=8)
    """

    layer: int
    role: str
    method: str
    rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.layer < MAX_LAYERS:
            problem = f"`0 <= layer < {MAX_LAYERS}` must hold"
            raise SpaceError("layer", self.layer, problem, "count blocks from 0")
        if self.role not in ROLES:
            raise SpaceError("role", self.role, "unknown role", f"use one of {', '.join(ROLES)}")
        if not 0 <= self.rank <= MAX_RANK:
            where = f"layer {self.layer} ({self.role})"
            problem = f"`0 <= rank <= {MAX_RANK}` must hold at {where}"
            raise SpaceError("rank", self.rank, problem, "use a rank within these limits")


@dataclass(frozen=True)
class AdapterPlan:
    """The architecture: which adapter is at which site.

    Specs are sorted and those with method "none" are dropped, so that equal architectures compare,
    hash and digest the same.

    Example:
        >>> specs = [LayerSpec(1, "attn.v", "ia3"), LayerSpec(0, "attn.q", "lora", rank=8)]
        >>> plan = AdapterPlan(specs)
        >>> plan.methods, plan.lowest_layer
        (('ia3', 'lora'), 0)
        >>> AdapterPlan.from_json(plan.to_json()) == plan
        True

    Raises:
        SpaceError: if two specs name the same site.
    """

    specs: tuple[LayerSpec, ...] = ()

    def __init__(self, specs: Iterable[LayerSpec] = ()) -> None:
        kept = tuple(sorted(spec for spec in specs if spec.method != "none"))
        sites = [(spec.layer, spec.role) for spec in kept]
        for (layer, role), other in pairwise(sites):
            if (layer, role) == other:
                problem = "a site holds at most one adapter"
                raise SpaceError(
                    "plan", f"layer {layer} ({role})", problem, "remove one of the two"
                )
        object.__setattr__(self, "specs", kept)

    @cached_property
    def digest(self) -> str:
        """The identity of the architecture: 16 hex digits."""
        return _digest(self.to_json())

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods in use, sorted."""
        return tuple(sorted({spec.method for spec in self.specs}))

    @property
    def lowest_layer(self) -> int | None:
        """The lowest adapted block, where the backward pass ends; None for an empty plan."""
        return self.specs[0].layer if self.specs else None

    def to_json(self) -> list[dict[str, Any]]:
        """Return one dict for each adapter, in site order."""
        return list(to_plain(self.specs))

    @classmethod
    def from_json(cls, rows: Any) -> AdapterPlan:
        """Return the plan that `to_json` wrote.

        Raises:
            SpaceError: if a row lacks a key, has an unknown one, or a value of the wrong type.
        """
        kind = tuple[LayerSpec, ...]
        return cls(from_plain(kind, rows, field="plan", remedy=_REPAIR, error=SpaceError))


_NUMBERS = ("learning_rate", "alpha_ratio", "dropout", "weight_decay", "warmup_fraction", "alpha")
"""Settings of a training that are numbers."""


def _is_whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


@dataclass(frozen=True)
class TrainSettings:
    """How a plan is trained: AdamW, linear warmup, then linear decay to zero.

    Attributes:
        learning_rate: Peak learning rate; with `method_rates`, their geometric mean.
        method_rates: Sorted (method, peak rate) pairs for a plan that mixes methods; empty if all
            methods share `learning_rate`.
        alpha_ratio: Scaling of low-rank updates, alpha / rank, where `alpha` is None; also of those
            updates that have no rank.
        dropout: Dropout on the adapter's input, in [0, 1).
        steps: Optimizer steps of a full training.
        batch_size: Rows per optimizer step.
        weight_decay: AdamW's decoupled weight decay.
        warmup_fraction: Share of the steps that warm up.
        alpha: Alpha of low-rank updates, the same at every rank; None: `alpha_ratio` times the
            rank.

    Example:
        >>> train = TrainSettings(1e-3, method_rates=(("ia3", 1e-2), ("lora", 1e-4)))
        >>> train.rate_for("ia3")
        0.01
    """

    learning_rate: float
    method_rates: tuple[tuple[str, float], ...] = ()
    alpha_ratio: float = 2.0
    dropout: float = 0.0
    steps: int = 100
    batch_size: int = 16
    weight_decay: float = 0.0
    warmup_fraction: float = 0.05
    alpha: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "method_rates", tuple(sorted((str(m), float(r)) for m, r in self.method_rates))
        )
        for name in _NUMBERS:
            if to_float(value := getattr(self, name)) is None and (name, value) != ("alpha", None):
                raise SpaceError(name, value, "must be a number", "use e.g. 0.1")
        rates = [self.learning_rate, *(rate for _, rate in self.method_rates)]
        if not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise SpaceError("learning_rate", rates, "must be finite and above 0", "use e.g. 1e-3")
        for name in ("alpha_ratio", "alpha"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SpaceError(name, value, "must be finite and above 0", "use e.g. 16")
        if not 0.0 <= self.dropout < 1.0:
            raise SpaceError("dropout", self.dropout, "`0 <= dropout < 1` must hold", "use 0.0")
        for name in ("weight_decay", "warmup_fraction"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise SpaceError(name, value, "must be finite and not below 0", "use 0.0")
        if not all(_is_whole(count) and count >= 1 for count in (self.steps, self.batch_size)):
            raise SpaceError(
                "steps",
                (self.steps, self.batch_size),
                "steps and batch_size must be whole numbers from 1",
                "use e.g. steps=100, batch_size=16",
            )

    def alpha_for(self, rank: int) -> float:
        """Return alpha of a low-rank update, which is scaled by alpha / rank."""
        return self.alpha_ratio * rank if self.alpha is None else self.alpha

    def rate_for(self, method: str) -> float:
        """Return the learning rate of a method's parameters."""
        return dict(self.method_rates).get(method, self.learning_rate)

    def to_json(self) -> dict[str, Any]:
        """Return a dict in which `method_rates` is a mapping; without `alpha` if it is None."""
        row = {**to_plain(self), "method_rates": dict(self.method_rates)}
        # Candidates of versions that had no `alpha` keep their digests.
        return {name: value for name, value in row.items() if (name, value) != ("alpha", None)}

    @classmethod
    def from_json(cls, row: Any) -> TrainSettings:
        """Return the settings that `to_json` wrote.

        Raises:
            SpaceError: if a key is missing or unknown, or a value has the wrong type.
        """
        rates = row.get("method_rates") if isinstance(row, Mapping) else None
        if isinstance(rates, Mapping):
            row = {**row, "method_rates": tuple(rates.items())}
        from_plain(cls, row, field="train", remedy=_REPAIR, error=SpaceError)
        return cls(**row)  # numbers as written: the digest tells 2 from 2.0


@dataclass(frozen=True)
class Candidate:
    """An architecture and how it is trained: what a trial evaluates.

    Example:
        >>> plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", rank=8)])
        >>> candidate = Candidate(plan, TrainSettings(learning_rate=1e-3))
        >>> Candidate.from_json(candidate.to_json()).digest == candidate.digest
        True
    """

    plan: AdapterPlan
    train: TrainSettings

    @cached_property
    def digest(self) -> str:
        """The identity of the candidate and the name of its folder in `adapters/`."""
        return _digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return `{"plan": [...], "train": {...}}`."""
        return {"plan": self.plan.to_json(), "train": self.train.to_json()}

    @classmethod
    def from_json(cls, row: Any) -> Candidate:
        """Return the candidate that `to_json` wrote; further keys are ignored.

        Raises:
            SpaceError: if the plan or the train settings are damaged.
        """
        row = from_plain(dict[str, Any], row, field="candidate", remedy=_REPAIR, error=SpaceError)
        return cls(
            AdapterPlan.from_json(row.get("plan")), TrainSettings.from_json(row.get("train"))
        )
