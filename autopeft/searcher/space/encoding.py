"""Point: a candidate as a few integers, and its conversion to and from candidates and parameters.

Samplers work on points, because thousands of them are cheap. The study stores readable parameters
such as `layer.03.method`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopeft import methods
from autopeft.errors import SpaceError
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.searcher.space.config import SpaceConfig
from autopeft.searcher.space.grid import Grid, Option

POSITION_STEPS = 1000
"""Learning-rate positions are multiples of 1/1000, so that they survive the rounding of rates."""


PointKey = tuple[bytes, int, int, int]


@dataclass(frozen=True, eq=False)
class Point:
    """A point of a search space.

    Attributes:
        options: Option index of each unit, shape (n_units,).
        position: Position in each method's range of learning rates, in [0, 1] on a log scale.
        alpha: Index into the space's choices of alpha or of alpha / rank.
        dropout: Index into the space's dropouts.
    """

    options: NDArray[np.int64]
    position: float = 0.5
    alpha: int = 0
    dropout: int = 0

    @cached_property
    def key(self) -> PointKey:
        """A hashable key, equal for equal points."""
        return (
            self.options.astype(np.int16).tobytes(),
            round(self.position * POSITION_STEPS),
            self.alpha,
            self.dropout,
        )


def snap(position: float) -> float:
    """Round a learning-rate position to the grid of positions in [0, 1]."""
    return min(max(round(position * POSITION_STEPS), 0), POSITION_STEPS) / POSITION_STEPS


def round_rate(rate: float) -> float:
    """Round a learning rate to 3 significant digits."""
    return float(f"{rate:.3g}")


class Encoder:
    """Converts points of a grid to candidates and to parameters, and back.

    Args:
        config: Choices of training settings, ranges of learning rates.
        grid: Units and options.
        base: Training settings that every candidate shares, such as the number of steps.
        has_head: Whether a new head is trained too.
    """

    def __init__(
        self, config: SpaceConfig, grid: Grid, base: TrainSettings, *, has_head: bool
    ) -> None:
        self.config = config
        self.grid = grid
        self.base = base
        self.has_head = has_head
        self._points: dict[str, Point | None] = {}

    def rates(self, name: str) -> tuple[float, float]:
        """Return the range (low, high) of a method's learning rate in this space."""
        override = self.config.methods.get(name)
        own = override and override.learning_rate
        return own or methods.learning_rate_range(name)

    def rate_at(self, name: str, position: float) -> float:
        """Return a method's learning rate at a position."""
        low, high = self.rates(name)
        return round_rate(low * (high / low) ** position)

    def plan(self, point: Point) -> AdapterPlan:
        """Return the plan of a point."""
        chosen = enumerate(point.options.tolist())
        return AdapterPlan([spec for place in chosen for spec in self.grid.sites[place]])

    def train(self, point: Point, used: tuple[str, ...]) -> TrainSettings:
        """Return the training settings of a point whose plan uses these methods."""
        pairs = [(name, self.rate_at(name, point.position)) for name in used]
        extra = [(methods.HEAD, self.rate_at(methods.HEAD, point.position))] * self.has_head
        logs = [math.log(rate) for _, rate in pairs or extra or [("", 1e-3)]]
        rate = round_rate(math.exp(sum(logs) / len(logs)))
        alpha_name, alphas = self.config.alphas
        scaling: dict[str, Any] = {alpha_name: alphas[point.alpha]}
        return replace(
            self.base,
            learning_rate=rate,
            method_rates=tuple((pairs if len(pairs) > 1 else []) + extra),
            dropout=self.config.dropout[point.dropout],
            **scaling,
        )

    def to_candidate(self, point: Point) -> Candidate:
        """Return the candidate of a point."""
        plan = self.plan(point)
        return Candidate(plan, self.train(point, plan.methods))

    def point_of(self, candidate: Candidate) -> Point | None:
        """Return the point of a candidate, or None if it is not in this space; cached."""
        if candidate.digest not in self._points:
            try:
                self._points[candidate.digest] = self.from_candidate(candidate)
            except SpaceError:
                self._points[candidate.digest] = None
        return self._points[candidate.digest]

    def from_candidate(self, candidate: Candidate) -> Point:
        """Return the point of a candidate.

        Raises:
            SpaceError: if the candidate is not in this space.
        """
        places = {(spec.layer, spec.role): spec for spec in candidate.plan.specs}
        options = []
        for index, unit in enumerate(self.grid.units):
            sites = itertools.product(unit.layers, unit.roles)
            here = sorted(places.pop(site) for site in sites if site in places)
            options.append(self._option_with(index, tuple(here)))
        if places:
            spec = next(iter(places.values()))
            raise SpaceError(
                "candidate",
                f"layer {spec.layer} ({spec.role})",
                "not in this space",
                "widen the space",
            )
        train = candidate.train
        alpha_name, alphas = self.config.alphas
        alpha = _index_of(alpha_name, _given_alpha(train, alpha_name), alphas)
        dropout = _index_of("dropout", train.dropout, self.config.dropout)
        point = Point(np.array(options, dtype=np.int64), 0.0, alpha, dropout)
        return replace(point, position=self._position(point, candidate))

    def _option_with(self, unit: int, specs: tuple[LayerSpec, ...]) -> int:
        if not specs:
            return 0
        for option, choice in enumerate(self.grid.options):
            if (
                choice.method == specs[0].method
                and choice.rank == specs[0].rank
                and tuple(sorted(self.grid.sites.get((unit, option), ()))) == specs
            ):
                return option
        raise SpaceError(
            "candidate",
            f"{self.grid.units[unit].name}: {specs[0].method} r={specs[0].rank}",
            "no option of this space",
            "widen the space",
        )

    def _position(self, point: Point, candidate: Candidate) -> float:
        """Find the position whose rounded learning rates are the candidate's."""
        train, used = candidate.train, candidate.plan.methods
        names = used or ((methods.HEAD,) if self.has_head else ())
        if not names:
            return 0.5
        low, high = self.rates(names[0])
        if high == low:
            return 0.5
        guess = math.log(train.rate_for(names[0]) / low) / math.log(high / low)
        if not -1e-3 <= guess <= 1.0 + 1e-3:
            raise SpaceError(
                "candidate",
                train.rate_for(names[0]),
                f"the learning rate of {names[0]} is in [{low}, {high}] in this space",
                "widen its range",
            )
        wanted = (train.learning_rate, train.method_rates)
        near = [snap(guess + step / POSITION_STEPS) for step in (0, 1, -1, 2, -2, 3, -3)]
        for position in near:
            found = self.train(replace(point, position=position), used)
            if (found.learning_rate, found.method_rates) == wanted:
                return position
        return near[0]

    def to_params(self, point: Point) -> dict[str, Any]:
        """Return readable parameters: each unit's method, with rank and placement if it has any."""
        values: dict[str, Any] = {"lr_position": point.position}
        chosen = {self.config.alphas[0]: point.alpha, "dropout": point.dropout}
        for name, choices in self.config.varied.items():
            values[name] = choices[chosen[name]]
        for unit, option in zip(self.grid.units, point.options, strict=True):
            choice = self.grid.options[int(option)]
            values[f"{unit.name}.method"] = choice.method
            if choice.rank:
                values[f"{unit.name}.rank"] = choice.rank
            if choice.placement and self._has_placements(choice.method):
                values[f"{unit.name}.placement"] = choice.placement
        return values

    def from_params(self, values: Mapping[str, Any]) -> Point:
        """Return the point of such parameters; a rank between two options is rounded.

        Raises:
            SpaceError: if a unit has no method or an unknown one.
        """
        options = [self._option_of(index, values) for index in range(len(self.grid.units))]
        alpha_name, alphas = self.config.alphas
        return Point(
            np.array(options, dtype=np.int64),
            snap(float(values.get("lr_position", 0.5))),
            _index_of(alpha_name, values.get(alpha_name, alphas[0]), alphas),
            _index_of(
                "dropout", values.get("dropout", self.config.dropout[0]), self.config.dropout
            ),
        )

    def _option_of(self, unit: int, values: Mapping[str, Any]) -> int:
        name = self.grid.units[unit].name
        method = values.get(f"{name}.method", "none")
        if method == "none":
            return 0
        placement = values.get(f"{name}.placement")
        rank = values.get(f"{name}.rank", 0)
        exact = self.grid.index.get(Option(method, rank, placement or ""))
        if exact is not None and self.grid.legal[unit, exact]:
            return exact
        legal = [
            option
            for option, choice in enumerate(self.grid.options)
            if choice.method == method and self.grid.legal[unit, option]
        ]
        same = [o for o in legal if self.grid.options[o].placement == placement] or legal
        if not same:
            raise SpaceError(f"{name}.method", method, "not a choice there", "use one of the space")
        wanted = math.log(max(rank, 1))
        return min(same, key=lambda o: abs(math.log(max(self.grid.options[o].rank, 1)) - wanted))

    def _has_placements(self, method: str) -> bool:
        return len({o.placement for o in self.grid.options if o.method == method}) > 1

    @cached_property
    def parameters(self) -> dict[str, dict[str, Any]]:
        """Every parameter that points can have, as plain data.

        Name -> {"kind": "categorical", "choices": [...]}, {"kind": "float", "low", "high"} or
        {"kind": "int", "low", "high", "log"}. Rank and placement have "when": the methods of their
        unit that have them.
        """
        grid = self.grid
        result: dict[str, dict[str, Any]] = {
            "lr_position": {
                "kind": "float", "low": 0.0, "high": 1.0, "step": 1.0 / POSITION_STEPS,
            }
        }  # fmt: skip
        for key, choices in self.config.varied.items():
            result[key] = {"kind": "categorical", "choices": list(choices)}
        for index, unit in enumerate(grid.units):
            fitting = [grid.options[o] for o in np.flatnonzero(grid.legal[index])]
            names = list(dict.fromkeys(option.method for option in fitting))
            result[f"{unit.name}.method"] = {"kind": "categorical", "choices": names}
            sized = [option for option in fitting if option.rank]
            if sized:
                ranks = [option.rank for option in sized]
                result[f"{unit.name}.rank"] = {
                    "kind": "int",
                    "low": min(ranks),
                    "high": max(ranks),
                    "log": True,
                    "when": sorted({option.method for option in sized}),
                }
            placed = [o for o in fitting if o.placement and self._has_placements(o.method)]
            if placed:
                result[f"{unit.name}.placement"] = {
                    "kind": "categorical",
                    "choices": list(dict.fromkeys(option.placement for option in placed)),
                    "when": sorted({option.method for option in placed}),
                }
        return result


def _given_alpha(train: TrainSettings, name: str) -> float | None:
    """Return the setting of that name; None if the other one scales the updates."""
    if name == "alpha":
        return train.alpha
    return train.alpha_ratio if train.alpha is None else None


def _index_of(name: str, value: Any, choices: tuple[float, ...]) -> int:
    for index, choice in enumerate(choices):
        if value is not None and math.isclose(float(value), choice, rel_tol=1e-9, abs_tol=1e-12):
            return index
    raise SpaceError(name, value, f"this space has {list(choices)}", "use one of these")
