"""A second set of parameters for one space: first the total cost, then how it is shared out.

In the plain parameters the costs of plans crowd in the middle of the axis, since sums concentrate,
and a sampler that models parameters one by one never leaves the crowd. Here the first parameter is
the total, so that any sampler covers the whole axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from autopeft.searcher.space.encoding import Encoder, Point, snap
from autopeft.searcher.space.sampling import allocate

_WIDEST = 2.0
"""A unit may get exp(2) times the mean share, or exp(-2) times."""


class BudgetFirstEncoding:
    """Parameters `log_cost`, `lr_position`, and for each unit method, placement and share.

    Args:
        encoder: Of the space.
        head_params: Parameters every candidate trains.
        log_range: Natural logarithms of fewest and most trainable parameters.
    """

    def __init__(self, encoder: Encoder, head_params: int, log_range: tuple[float, float]) -> None:
        self._encoder = encoder
        self._head = head_params
        self._range = log_range

    def parameters(self) -> dict[str, dict[str, Any]]:
        """As plain data; see `Encoder.parameters`."""
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
        """The point of such parameters: ranks are found so that costs fit total and shares."""
        grid = self._encoder.grid
        plain = {k: v for k, v in values.items() if not k.endswith((".share", "log_cost"))}
        rough = self._encoder.from_params({**plain, **{f"{u.name}.rank": 1 for u in grid.units}})
        wanted = math.exp(float(values["log_cost"])) - self._head
        shares = np.array([_WIDEST * float(values[f"{unit.name}.share"]) for unit in grid.units])
        options = np.zeros(len(grid.units), dtype=np.int64)
        ladders = {
            unit: self._ladder(unit, int(option))
            for unit, option in enumerate(rough.options)
            if option
        }
        # Dearest first of all to go: the units that asked for the least.
        order = sorted(ladders, key=lambda unit: -shares[unit])
        kept: list[int] = []
        floor = 0.0
        for unit in order:
            floor += float(grid.params[unit, ladders[unit][0]])
            if kept and floor > wanted * 1.05:
                break
            kept.append(unit)
        if kept:
            width = max(len(ladders[unit]) for unit in kept)
            costs = np.full((len(kept), width), np.inf)
            for row, unit in enumerate(kept):
                costs[row, : len(ladders[unit])] = grid.params[unit, ladders[unit]]
            picks = allocate(costs, np.exp(shares[kept]), wanted)
            for row, unit in enumerate(kept):
                options[unit] = ladders[unit][int(picks[row])]
        return Point(options, rough.position, rough.alpha, rough.dropout)

    def _ladder(self, unit: int, option: int) -> list[int]:
        """The options with the same method and placement, by cost."""
        grid = self._encoder.grid
        alike = (
            (grid.method_of == grid.method_of[option])
            & (grid.placement_of == grid.placement_of[option])
            & grid.legal[unit]
        )
        return sorted((int(o) for o in np.flatnonzero(alike)), key=lambda o: grid.params[unit, o])

    def encode(self, point: Point) -> dict[str, Any]:
        """Parameters whose decoding comes near the point."""
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
            share = math.log(cost / mean) / _WIDEST if cost > 0 else -1.0
            values[f"{unit.name}.share"] = min(max(share, -1.0), 1.0)
        return values


class PlainEncoding:
    """The plain parameters, all of them always there: what samplers without conditions need.

    Args:
        encoder: Of the space.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def parameters(self) -> dict[str, dict[str, Any]]:
        """As plain data; see `Encoder.parameters`."""
        return self._encoder.parameters()

    def decode(self, values: Mapping[str, Any]) -> Point:
        """The point of such parameters."""
        return self._encoder.from_params(values)

    def encode(self, point: Point) -> dict[str, Any]:
        """The parameters of a point; what it has no use for gets a middling value."""
        plain = self._encoder.to_params(point)
        return {name: plain.get(name, _default(row)) for name, row in self.parameters().items()}


def _default(row: Mapping[str, Any]) -> Any:
    if row["kind"] == "categorical":
        return row["choices"][0]
    if row["kind"] == "int":
        return row["low"]
    return snap((row["low"] + row["high"]) / 2)
