"""Which point to try next: the brain of the sampler, in plain numbers, knowing no Optuna."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from autopeft.costs import Price
from autopeft.costs.constraints import Constraint
from autopeft.costs.objectives import Objective
from autopeft.plan import Candidate
from autopeft.searcher.space.encoding import Point
from autopeft.searcher.space.space import SearchSpace

COST_PROXIES: Mapping[str, str] = {"train_seconds": "train_flops", "latency_ms": "inference_flops"}
"""Costs not known before training, and the priced cost that moves with each."""


class Pricer(Protocol):
    """Whatever prices a candidate; `PriceTable` does."""

    def price(self, candidate: Candidate) -> Price:
        """What it costs."""


@dataclass(frozen=True)
class Seen:
    """One earlier trial.

    Attributes:
        point: What was tried; None if it is no point of the space.
        state: How it stands.
        objectives: Values in the objectives' own directions; NaN where unknown.
        price: Its price.
        rungs: Step -> score, in the quality's direction.
        origin: Where it came from; "baseline" for a LoRA.
    """

    point: Point | None
    state: Literal["complete", "pruned", "failed", "running"]
    objectives: tuple[float, ...]
    price: Mapping[str, float]
    rungs: Mapping[int, float] = field(default_factory=dict)
    origin: str = "search"


class Sampler(Protocol):
    """Whoever chooses the next point.

    Attributes:
        origin: "design" if the last point was drawn to spread trials out, else "search".
    """

    origin: str

    def propose(self, history: Sequence[Seen]) -> Point:
        """The next point."""

    def propose_baseline(self, history: Sequence[Seen], choices: Sequence[Point]) -> Point:
        """Which of some LoRA baselines to try next."""


class StratifiedSampler:
    """Random draws, spread over cost on a log scale.

    Args:
        space: Where to draw.
        objectives: Quality first.
        pricer: Prices candidates.
        constraints: Limits to keep.
        seed: Of the random numbers.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        pricer: Pricer,
        constraints: Sequence[Constraint] = (),
        seed: int = 0,
    ) -> None:
        self.space = space
        self.objectives = tuple(objectives)
        self.pricer = pricer
        self.constraints = tuple(constraints)
        self.rng = np.random.default_rng(seed)
        self.origin = "search"

    def propose(self, history: Sequence[Seen]) -> Point:
        """The next point; not one of the history's, as far as drawing finds another."""
        known = {seen.point.key for seen in history if seen.point is not None}
        low, high = self.log_cost_range()
        point = self.space.point_sampler.at_cost(self.rng, self.rng.uniform(low, high))
        for _ in range(50):
            if point.key not in known and self.is_allowed(point):
                break
            point = self.space.point_sampler.at_cost(self.rng, self.rng.uniform(low, high))
        return point

    def is_allowed(self, point: Point) -> bool:
        """Whether its price keeps the constraints."""
        if not self.constraints:
            return True
        price = self.pricer.price(self.space.encoder.to_candidate(point))
        return all(limit.allows(price) for limit in self.constraints)

    def propose_baseline(self, history: Sequence[Seen], choices: Sequence[Point]) -> Point:
        """The first of the choices: they come most telling first."""
        return choices[0]

    def log_cost_range(self) -> tuple[float, float]:
        """Of trainable parameters, as far as the constraints allow."""
        low, high = self.space.cost_range()
        for limit in self.constraints:
            if limit.name == "trainable_params":
                high = min(high, limit.limit)
            elif limit.name == "adapter_bytes":
                high = min(high, limit.limit / 4)
        return float(np.log(max(low, 1.0))), float(np.log(max(high, low, 1.0)))
