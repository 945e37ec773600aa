"""Encodings of a space for Optuna's samplers: plain parameters, or the total cost first.

With plain parameters most plans have a cost near the middle of its range, because sums concentrate,
and a sampler that models each parameter independently stays there. With the total cost as a
parameter, any sampler covers the whole range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from autopeft.searcher.space.encoding import Encoder, Point, snap
from autopeft.searcher.space.sampling import allocate

_MAX_LOG_SHARE = 2.0
"""A unit gets between exp(-2) and exp(2) times the mean share."""


class PlainEncoding:
    """The plain parameters without conditions: every parameter always has a value.

    Args:
        encoder: Encoder of the space.

    Attributes:
        parameters: The parameters as plain data, see `Encoder.parameters`.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.parameters = encoder.parameters

    def decode(self, values: Mapping[str, Any]) -> Point:
        """Return the point of such parameters."""
        return self._encoder.from_params(values)

    def encode(self, point: Point) -> dict[str, Any]:
        """Return the parameters of a point, with defaults for those it does not have."""
        plain = self._encoder.to_params(point)
        return {name: plain.get(name, _default(row)) for name, row in self.parameters.items()}


class BudgetFirstEncoding(PlainEncoding):
    """Parameters `log_cost` and `lr_position`, and method, placement and share of each unit.

    Args:
        encoder: Encoder of the space.
        head_params: Parameters that every candidate trains.
        log_range: Natural logarithms of the fewest and most trainable parameters.
    """

    def __init__(self, encoder: Encoder, head_params: int, log_range: tuple[float, float]) -> None:
        super().__init__(encoder)
        self._head = head_params
        self._range = log_range
        self.parameters = {
            "log_cost": {"kind": "float", "low": log_range[0], "high": log_range[1]},
            **{
                name: {key: value for key, value in row.items() if key != "when"}
                for name, row in encoder.parameters.items()
                if not name.endswith(".rank")
            },
            **{
                f"{unit.name}.share": {"kind": "float", "low": -1.0, "high": 1.0}
                for unit in encoder.grid.units
            },
        }

    def decode(self, values: Mapping[str, Any]) -> Point:
        """Return the point of such parameters, with ranks that match the total and the shares."""
        grid = self._encoder.grid
        ranks = {f"{unit.name}.rank": 1 for unit in grid.units}
        template = self._encoder.from_params({**values, **ranks})
        target = math.exp(float(values["log_cost"])) - self._head
        shares = np.array(
            [_MAX_LOG_SHARE * float(values[f"{unit.name}.share"]) for unit in grid.units]
        )
        options = np.zeros(len(grid.units), dtype=np.int64)
        options_by_cost = {
            unit: self._same_kind(unit, int(option))
            for unit, option in enumerate(template.options)
            if option
        }
        # If the total is too small for all units, leave out those with the smallest shares.
        kept: list[int] = []
        floor = 0.0
        for unit in sorted(options_by_cost, key=lambda unit: -shares[unit]):
            floor += float(grid.params[unit, options_by_cost[unit][0]])
            if kept and floor > target * 1.05:
                break
            kept.append(unit)
        if kept:
            width = max(len(options_by_cost[unit]) for unit in kept)
            costs = np.full((len(kept), width), np.inf)
            for row, unit in enumerate(kept):
                costs[row, : len(options_by_cost[unit])] = grid.params[unit, options_by_cost[unit]]
            picks = allocate(costs, np.exp(shares[kept]), target)
            for row, unit in enumerate(kept):
                options[unit] = options_by_cost[unit][int(picks[row])]
        return replace(template, options=options)

    def _same_kind(self, unit: int, option: int) -> list[int]:
        """Return the options with the same method and placement, sorted by cost."""
        grid = self._encoder.grid
        alike = np.flatnonzero((grid.kind_of == grid.kind_of[option]) & grid.legal[unit])
        return sorted(alike.tolist(), key=lambda o: grid.params[unit, o])

    def encode(self, point: Point) -> dict[str, Any]:
        """Return parameters that decode to a point near this one."""
        grid = self._encoder.grid
        costs = grid.params[np.arange(len(grid.units)), point.options]
        total = float(costs.sum()) + self._head
        mean = float(costs[costs > 0].mean()) if (costs > 0).any() else 1.0
        low, high = self._range
        values = super().encode(point)
        values["log_cost"] = min(max(math.log(max(total, 1.0)), low), high)
        for unit, cost in zip(grid.units, costs, strict=True):
            share = math.log(cost / mean) / _MAX_LOG_SHARE if cost > 0 else -1.0
            values[f"{unit.name}.share"] = min(max(share, -1.0), 1.0)
        return values


def _default(row: Mapping[str, Any]) -> Any:
    if row["kind"] == "categorical":
        return row["choices"][0]
    if row["kind"] == "int":
        return row["low"]
    return snap((row["low"] + row["high"]) / 2)
