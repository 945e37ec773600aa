"""What a trial is: where adapters go (AdapterPlan), how they are trained, both together."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Any

from autopeft.errors import SpaceError

MODEL = "model"
"""The role of the model as a whole: a plan holds one such adapter, at layer 0."""

ROLES: tuple[str, ...] = (
    MODEL,  # before any block: prompts
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.qkv",  # models that fuse the three (GPT-2, GPT-NeoX, Phi-3)
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
    "norm",  # every normalization inside one block, together
    "block",  # the block as a whole
)
"""The roles a site can have, in the order a block is read."""


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(value: object) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON: short enough for a folder name."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:16]


@dataclass(frozen=True, order=True)
class LayerSpec:
    """One adapter at one site.

    Attributes:
        layer: Index of the block, from 0.
        role: One of `ROLES`.
        method: Name in the methods table (`autopeft methods`).
        rank: Rank, or the method's own size (OFT block size); 0 for a method that has no size.
    """

    layer: int
    role: str
    method: str
    rank: int = 0

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise SpaceError("layer", self.layer, "`layer >= 0` must hold", "count blocks from 0")
        if self.role not in ROLES:
            raise SpaceError("role", self.role, "no such role", f"use one of {', '.join(ROLES)}")
        if self.rank < 0:
            where = f"layer {self.layer} ({self.role})"
            raise SpaceError(
                "rank", self.rank, f"`rank >= 0` must hold at {where}", "use a positive rank"
            )


@dataclass(frozen=True)
class AdapterPlan:
    """The architecture: which adapter sits at which site.

    Specs are sorted and entries whose method is "none" dropped, so that two ways of writing one
    architecture compare, hash and digest the same.

    Raises:
        SpaceError: if two specs name the same site.
    """

    specs: tuple[LayerSpec, ...] = ()

    def __init__(self, specs: Iterable[LayerSpec] = ()) -> None:
        kept = tuple(sorted(spec for spec in specs if spec.method != "none"))
        sites = [(spec.layer, spec.role) for spec in kept]
        for first, second in pairwise(sites):
            if first == second:
                raise SpaceError(
                    "plan",
                    f"layer {first[0]} ({first[1]})",
                    "a site holds at most one adapter",
                    "drop one of the two",
                )
        object.__setattr__(self, "specs", kept)

    @cached_property
    def digest(self) -> str:
        """Identity of the architecture: hex digits of a SHA-256."""
        return _digest(self.to_json())

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods in use, sorted, each once."""
        return tuple(sorted({spec.method for spec in self.specs}))

    @property
    def lowest_layer(self) -> int | None:
        """The first adapted block: the backward pass stops there. None for an empty plan."""
        return self.specs[0].layer if self.specs else None

    def to_json(self) -> list[dict[str, Any]]:
        """A list of plain dicts, in site order."""
        return [asdict(spec) for spec in self.specs]

    @classmethod
    def from_json(cls, rows: Iterable[Mapping[str, Any]]) -> AdapterPlan:
        """The plan that `to_json` wrote.

        Raises:
            SpaceError: if a row lacks a key, has an unknown one, or a value of the wrong type.
        """
        specs = []
        for row in rows:
            if not isinstance(row, Mapping) or set(row) - {"rank"} != {"layer", "role", "method"}:
                raise SpaceError(
                    "plan", row, "a row has the keys layer, role, method, rank", "repair plan.json"
                )
            whole = [row["layer"], row.get("rank", 0)]
            if any(isinstance(n, bool) or not isinstance(n, int) for n in whole):
                raise SpaceError(
                    "plan", dict(row), "layer and rank are whole numbers", "repair plan.json"
                )
            specs.append(LayerSpec(whole[0], str(row["role"]), str(row["method"]), whole[1]))
        return cls(specs)


@dataclass(frozen=True)
class TrainSettings:
    """How a plan is trained.

    Attributes:
        learning_rate: Peak rate. For a plan that mixes methods, the geometric mean of the
            methods' own rates (each method has its own range; see `method_rates`).
        method_rates: (method, rate) pairs, sorted, for a plan that mixes methods; empty when all
            methods share `learning_rate`.
        alpha_ratio: Scaling of low-rank updates, alpha / rank.
        dropout: Dropout before the adapter, in [0, 1).
        steps: Optimizer steps of a full proxy training.
        batch_size: Rows per step.
        weight_decay: AdamW's decoupled weight decay.
        warmup_fraction: Share of the steps in which the rate rises linearly; then it decays
            linearly.
    """

    learning_rate: float
    method_rates: tuple[tuple[str, float], ...] = ()
    alpha_ratio: float = 2.0
    dropout: float = 0.0
    steps: int = 100
    batch_size: int = 16
    weight_decay: float = 0.0
    warmup_fraction: float = 0.05

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "method_rates", tuple(sorted((str(m), float(r)) for m, r in self.method_rates))
        )
        rates = [self.learning_rate, *(rate for _, rate in self.method_rates)]
        if not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise SpaceError(
                "learning_rate", rates, "a learning rate is finite and above 0", "use e.g. 1e-3"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise SpaceError("dropout", self.dropout, "`0 <= dropout < 1` must hold", "use 0.0")
        if self.steps < 1 or self.batch_size < 1:
            raise SpaceError(
                "steps",
                (self.steps, self.batch_size),
                "steps and batch_size are at least 1",
                "raise it",
            )

    def rate_for(self, method: str) -> float:
        """The learning rate of one method's parameters."""
        return dict(self.method_rates).get(method, self.learning_rate)

    def to_json(self) -> dict[str, Any]:
        """A plain dict; `method_rates` becomes a mapping."""
        return {**asdict(self), "method_rates": dict(self.method_rates)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> TrainSettings:
        """The settings that `to_json` wrote.

        Raises:
            SpaceError: if a key is unknown.
        """
        unknown = set(row) - {f.name for f in fields(cls)}
        if unknown:
            raise SpaceError("train", sorted(unknown), "unknown keys", "repair the file")
        rates = dict(row.get("method_rates", {}))
        return cls(**{**row, "method_rates": tuple(rates.items())})


@dataclass(frozen=True)
class Candidate:
    """What a trial is: an architecture and how it is trained."""

    plan: AdapterPlan
    train: TrainSettings

    @cached_property
    def digest(self) -> str:
        """Identity of the candidate; names its folder below `adapters/`."""
        return _digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """`{"plan": [...], "train": {...}}`."""
        return {"plan": self.plan.to_json(), "train": self.train.to_json()}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Candidate:
        """The candidate that `to_json` wrote."""
        return cls(AdapterPlan.from_json(row["plan"]), TrainSettings.from_json(row["train"]))
