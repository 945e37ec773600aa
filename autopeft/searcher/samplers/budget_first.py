"""Encodings of a space for Optuna's samplers: plain parameters, or the total cost first.

With plain parameters most plans have a cost near the middle of its range, because sums concentrate,
and a sampler that models each parameter independently stays there. With the total cost as a
parameter, any sampler covers the whole range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from autopeft.searcher.space.encoding import Encoder, Point, snap
from autopeft.searcher.space.sampling import allocate

_MAX_LOG_SHARE = 2.0
"""A unit gets between exp(-2) and exp(2) times the mean share."""


class BudgetFirstEncoding:
    """Parameters `log_cost` and `lr_position`, and method, placement and share of each unit.

    Args:
        encoder: Encoder of the space.
        head_params: Parameters that every candidate trains.
        log_range: Natural logarithms of the fewest and most trainable parameters.
    """

    def __init__(self, encoder: Encoder, head_params: int, log_range: tuple[float, float]) -> None:
        self._encoder = encoder
        self._head = head_params
        self._range = log_range

    def parameters(self) -> dict[str, dict[str, Any]]:
        """Return the parameters as plain data, see `Encoder.parameters`."""
        plain = self._encoder.parameters()
        low, high = self._range
        result: dict[str, dict[str, Any]] = {
            "log_cost": {"kind": "float", "low": low, "high": high}
        }
        for name, row in plain.items():
            if not name.endswith(".rank"):
                result[name] = {key: value for key, value in row.items() if key != "when"}
        for unit in self._encoder.grid.units:
            result[f"{unit.name}.share"] = {"kind": "float", "low": -1.0, "high": 1.0}
        return result

    def decode(self, values: Mapping[str, Any]) -> Point:
        """Return the point of such parameters, with ranks that match the total and the shares."""
        grid = self._encoder.grid
        plain = {k: v for k, v in values.items() if not k.endswith((".share", "log_cost"))}
        ranks = {f"{unit.name}.rank": 1 for unit in grid.units}
        template = self._encoder.from_params({**plain, **ranks})
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
        order = sorted(options_by_cost, key=lambda unit: -shares[unit])
        kept: list[int] = []
        floor = 0.0
        for unit in order:
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
        return Point(options, template.position, template.alpha, template.dropout)

    def _same_kind(self, unit: int, option: int) -> list[int]:
        """Return the options with the same method and placement, sorted by cost."""
        grid = self._encoder.grid
        alike = (
            (grid.method_of == grid.method_of[option])
            & (grid.placement_of == grid.placement_of[option])
            & grid.legal[unit]
        )
        return sorted((int(o) for o in np.flatnonzero(alike)), key=lambda o: grid.params[unit, o])

    def encode(self, point: Point) -> dict[str, Any]:
        """Return parameters that decode to a point near this one."""
        grid = self._encoder.grid
        plain = self._encoder.to_params(point)
        costs = grid.params[np.arange(len(grid.units)), point.options]
        total = float(costs.sum()) + self._head
        mean = float(costs[costs > 0].mean()) if (costs > 0).any() else 1.0
        low, high = self._range
        values: dict[str, Any] = {}
        for name, row in self.parameters().items():
            if name == "log_cost":
                values[name] = min(max(math.log(max(total, 1.0)), low), high)
            elif name.endswith(".share"):
                continue
            else:
                values[name] = plain.get(name, _default(row))
        for unit, cost in zip(grid.units, costs, strict=True):
            share = math.log(cost / mean) / _MAX_LOG_SHARE if cost > 0 else -1.0
            values[f"{unit.name}.share"] = min(max(share, -1.0), 1.0)
        return values


class PlainEncoding:
    """The plain parameters without conditions: every parameter always has a value.

    Args:
        encoder: Encoder of the space.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def parameters(self) -> dict[str, dict[str, Any]]:
        """Return the parameters as plain data, see `Encoder.parameters`."""
        return self._encoder.parameters()

    def decode(self, values: Mapping[str, Any]) -> Point:
        """Return the point of such parameters."""
        return self._encoder.from_params(values)

    def encode(self, point: Point) -> dict[str, Any]:
        """Return the parameters of a point, with defaults for those it does not have."""
        plain = self._encoder.to_params(point)
        return {name: plain.get(name, _default(row)) for name, row in self.parameters().items()}


def _default(row: Mapping[str, Any]) -> Any:
    if row["kind"] == "categorical":
        return row["choices"][0]
    if row["kind"] == "int":
        return row["low"]
    return snap((row["low"] + row["high"]) / 2)
