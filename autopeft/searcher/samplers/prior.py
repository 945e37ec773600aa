"""Prior: trainings on other models and data, as points of this search's space.

A row tells what one method in one part of a model reached. It names depth and roles instead of
blocks, so that it means something in any model. Qualities are compared within a setting alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from autopeft.errors import SettingsError
from autopeft.searcher.space.encoding import Point, snap
from autopeft.searcher.space.grid import Grid
from autopeft.searcher.space.initial_design import single_method
from autopeft.searcher.space.space import SearchSpace
from autopeft.utils.formatting import one_line
from autopeft.utils.serialize import from_plain, read_json, to_plain

Array = NDArray[np.float64]

_MIN_OVERLAP = 0.5
"""Least share of roles that a row and a placement of the space must have in common."""

_MARGIN = 0.1
"""How far outside a method's range of rates, in its widths, a row's rate is moved to the end."""


@dataclass(frozen=True)
class PriorRow:
    """What a training reached, on any model and data.

    Attributes:
        setting: Model and data, in any words; qualities are compared within it.
        method: Name of the method.
        roles: The roles it adapted.
        rank: Its size; 0 for a method that has none.
        quality: Larger is better; None if the training failed.
        depth: The part of the model, from 0 (input) to 1 (output).
        learning_rate: The method's; None if unknown, which stands for the middle of its range.
    """

    setting: str
    method: str
    roles: tuple[str, ...]
    rank: int
    quality: float | None
    depth: tuple[float, float] = (0.0, 1.0)
    learning_rate: float | None = None


_REMEDY = "give a JSON list of rows, see guides/first_search.md"

_MAX_RANK = 2**31 - 1


def read_prior(path: str | Path) -> tuple[PriorRow, ...]:
    """Read rows from a JSON file, a list of objects with the fields of `PriorRow`.

    Raises:
        SettingsError: if the file cannot be read, or a row is damaged.
    """
    rows = read_json(
        Path(path), tuple[PriorRow, ...], field="prior", remedy=_REMEDY, error=SettingsError
    )
    return checked_rows(rows, remedy=_REMEDY)


def checked_rows(
    rows: Sequence[PriorRow], *, remedy: str = "correct the row, or leave it out"
) -> tuple[PriorRow, ...]:
    """Return rows whose values have the types and ranges of `PriorRow`; numbers of numpy are taken.

    Raises:
        SettingsError: naming the first value that has not.
    """
    checked = tuple(_typed(index, row, remedy) for index, row in enumerate(rows))
    for index, row in enumerate(checked):
        low, high = row.depth
        wrong = (
            (not 0 <= low < high <= 1, "depth", row.depth, "`0 <= low < high <= 1` must hold"),
            (
                not 0 <= row.rank <= _MAX_RANK,
                "rank",
                row.rank,
                f"`0 <= rank <= {_MAX_RANK}` must hold",
            ),
            (not row.roles, "roles", row.roles, "is empty"),
            (
                row.quality is not None and not math.isfinite(row.quality),
                "quality",
                row.quality,
                "is not finite",
            ),
            (
                row.learning_rate is not None and not 0 < row.learning_rate < math.inf,
                "learning_rate",
                row.learning_rate,
                "`0 < learning_rate < inf` must hold",
            ),
        )
        for is_wrong, name, value, problem in wrong:
            if is_wrong:
                raise SettingsError(f"prior[{index}].{name}", value, problem, remedy)
    return checked


def _typed(index: int, row: PriorRow, remedy: str) -> PriorRow:
    """Return a row with values of the right types."""
    place = f"prior[{index}]"
    try:
        plain = to_plain(row)
        return from_plain(PriorRow, plain, field=place, remedy=remedy)
    except (TypeError, ValueError, OverflowError) as error:  # Of msgspec: no value of JSON.
        raise SettingsError(place, f"{row!r:.120}", one_line(error), remedy) from None


def normal_scores(rows: Sequence[PriorRow]) -> Array:
    """Return normal scores of the qualities within each setting, shape (len(rows),).

    Ranks, because one diverged training would outweigh all other differences. Failed ones are last.
    """
    scores = np.zeros(len(rows))
    for name in {row.setting for row in rows}:
        mine = [i for i, row in enumerate(rows) if row.setting == name]
        values = np.array([-np.inf if (q := rows[i].quality) is None else q for i in mine])
        below = (values[:, None] > values[None, :]).sum(axis=1)
        equal = (values[:, None] == values[None, :]).sum(axis=1)
        scores[mine] = ndtri((below + 0.5 * equal) / len(mine))
    return scores


def point_of(row: PriorRow, space: SearchSpace) -> Point | None:
    """Return the point of a space that is nearest to a row; None if none is near."""
    encoder, grid = space.encoder, space.grid
    if row.method not in grid.methods:
        return None
    position = _position(row, space)
    units = _units(row, space)
    if position is None or not units:
        return None
    placement = None
    if encoder.config.granularity != "site":
        options = [o for o, option in enumerate(grid.options) if option.method == row.method]
        overlap = {grid.options[o].placement: _overlap(row, grid, units[0], o) for o in options}
        placement = max(overlap, key=overlap.__getitem__)
        if overlap[placement] < _MIN_OVERLAP:
            return None
    point = single_method(encoder, row.method, placement, row.rank, 0.5, among=units)
    return point and replace(point, position=snap(position))


def _position(row: PriorRow, space: SearchSpace) -> float | None:
    low, high = space.encoder.rates(row.method)
    if row.learning_rate is None or high <= low:
        return 0.5
    position = math.log(row.learning_rate / low) / math.log(high / low)
    return position if -_MARGIN <= position <= 1.0 + _MARGIN else None


def _units(row: PriorRow, space: SearchSpace) -> list[int]:
    """Return the units in the row's part of the model; the nearest one if that is narrower."""
    n_layers = space.topology.n_layers
    low, high = row.depth
    kept: list[int] = []
    distances: dict[int, float] = {}
    for index, unit in enumerate(space.grid.units):
        if set(unit.roles) & set(row.roles):
            middle = (float(np.mean(unit.layers)) + 0.5) / n_layers
            distances[index] = abs(middle - (low + high) / 2)
            if low <= middle <= high:
                kept.append(index)
    if kept or not distances:
        return kept
    nearest = min(distances.values())
    return [index for index, distance in distances.items() if distance <= nearest + 1e-9]


def _overlap(row: PriorRow, grid: Grid, unit: int, option: int) -> float:
    """Return the roles in common over all roles of the row and of an option."""
    theirs, ours = set(row.roles), {spec.role for spec in grid.sites.get((unit, option), ())}
    return len(theirs & ours) / len(theirs | ours)
