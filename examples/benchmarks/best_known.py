"""The best front anyone finds in a landscape when asking is free: the yardstick of the benchmark.

A long local search on the true response, with every candidate's quality read off tables. The result
is kept in the temporary folder, under a name that changes with the code it came from.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import responses
from numpy.typing import NDArray
from responses import BASE_MS, BASE_QUALITY, KINDS, Response

from autopeft.searcher.space.encoding import POSITION_STEPS, Point
from autopeft.searcher.space.space import SearchSpace

Array = NDArray[np.float64]


def area(
    costs: Sequence[float], qualities: Sequence[float], log_range: tuple[float, float]
) -> float:
    """Hypervolume over log cost: the area under the best quality that each cost can buy.

    Args:
        costs: Of some candidates.
        qualities: Their qualities.
        log_range: Natural logarithms of the least and the largest cost; the reference point is the
            most expensive plan at the quality of the base.

    Returns:
        In quality times natural logarithms.
    """
    low, high = log_range
    logs = np.clip(np.log(np.maximum(np.asarray(costs, dtype=float), 1.0)), low, high)
    total, best, at = 0.0, BASE_QUALITY, low
    for row in np.lexsort((-np.asarray(qualities), logs)):
        if qualities[row] > best:
            total += (logs[row] - at) * (best - BASE_QUALITY)
            best, at = qualities[row], logs[row]
    return total + (high - at) * (best - BASE_QUALITY)


class Oracle:
    """True qualities of thousands of points at once.

    Args:
        response: The landscape.
        space: Its space, one unit a layer.
    """

    def __init__(self, response: Response, space: SearchSpace) -> None:
        self._response, self._space = response, space
        grid = space.grid
        self._effects = np.zeros((len(grid.units), len(grid.options)))
        self._added = np.zeros_like(self._effects)  # latency
        for (unit, option), specs in grid.sites.items():
            self._effects[unit, option] = sum(
                response.site(s.method, s.rank, s.layer, s.role)[0] for s in specs
            )
            sizes = [response.site(s.method, s.rank, s.layer, s.role)[1] for s in specs]
            self._added[unit, option] = sum(
                response.latency(s.method, n) for s, n in zip(specs, sizes, strict=True)
            )

    @property
    def log_range(self) -> tuple[float, float]:
        """Natural logarithms of the least and the largest cost."""
        if not self._response.traits.is_measured:
            return self._response.log_range
        added = np.where(self._space.grid.legal, self._added, 0.0).max(axis=1).sum()
        return math.log(BASE_MS), math.log(BASE_MS + float(added))

    def __call__(self, options: NDArray[np.int64], positions: Array) -> tuple[Array, Array]:
        """(costs, qualities), each of shape (n,).

        Args:
            options: Shape (n, n_units).
            positions: Learning-rate positions, shape (n,).
        """
        grid = self._space.grid
        effects = self._effects[np.arange(len(grid.units)), options]
        methods = grid.method_of[options]
        used = np.stack([(methods == m).any(axis=1) for m in range(len(grid.methods))], axis=1)
        params = self._space.n_params(options)
        rates = np.repeat(positions[:, None], len(grid.methods), axis=1)
        qualities = self._response.quality(effects, used, rates, params)
        if not self._response.traits.is_measured:
            return params, qualities
        added = self._added[np.arange(len(grid.units)), options]
        return BASE_MS + added.sum(axis=1), qualities


def best_known(kind: str, seed: int, space: SearchSpace, n_rounds: int = 80) -> float:
    """The area under the best known front of a landscape.

    Args:
        kind: The landscape.
        seed: Its seed.
        space: Its space.
        n_rounds: Of local search; each asks about 25,000 candidates.
    """
    code = [Path(__file__).read_bytes(), Path(responses.__file__).read_bytes()]
    text = json.dumps([kind, seed, repr(KINDS[kind]), space.describe(), n_rounds])
    name = hashlib.sha256(b"".join([*code, text.encode()])).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / "autopeft-landscapes" / f"{kind}-{seed}-{name}.json"
    if path.exists():
        return float(json.loads(path.read_text())["area"])
    params, qualities = _climb(Response.draw(kind, seed, space), space, n_rounds)
    found = area(params, qualities, Oracle(Response.draw(kind, seed, space), space).log_range)
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"area": found, "params": params.tolist(), "qualities": qualities.tolist()}
    path.write_text(json.dumps(row))
    return found


def _climb(response: Response, space: SearchSpace, n_rounds: int) -> tuple[Array, Array]:
    """(parameters, qualities) of a front that no single change improves much any more."""
    rng, oracle = np.random.default_rng(0), Oracle(response, space)
    start = [space.point_sampler.stratified(rng) for _ in range(2000)]
    options = np.array([g.options for g in start])
    positions = np.array([g.position for g in start])
    params, qualities = oracle(options, positions)
    for _ in range(n_rounds):
        parents = rng.integers(len(options), size=16)
        new = [_neighbors(space, options[p], positions[p], rng) for p in parents]
        new.append(_strays(space, options, positions, rng))
        options = np.concatenate([options, *(o for o, _ in new)])
        positions = np.concatenate([positions, *(p for _, p in new)])
        params, qualities = oracle(options, positions)
        keep = _staircase(params, qualities)
        options, positions = options[keep], positions[keep]
    return params[keep], qualities[keep]


def _staircase(params: Array, qualities: Array) -> NDArray[np.int64]:
    """Front members, one of each cost; sorting suffices with two objectives."""
    order = np.lexsort((-qualities, params))
    best = np.maximum.accumulate(np.append(BASE_QUALITY, qualities[order]))
    return order[qualities[order] > best[:-1]]


def _neighbors(
    space: SearchSpace, options: NDArray[np.int64], position: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], Array]:
    """Every change of one unit, each at the rate as it is or a little off."""
    legal = np.argwhere(space.grid.legal)
    many = np.tile(options, (len(legal), 1))
    many[np.arange(len(legal)), legal[:, 0]] = legal[:, 1]
    steps = rng.choice([0.0, 0.01, 0.05], len(many)) * rng.normal(0.0, 1.0, len(many))
    moved = np.round(np.clip(position + steps, 0.0, 1.0) * POSITION_STEPS) / POSITION_STEPS
    return many, moved


def _strays(
    space: SearchSpace, options: NDArray[np.int64], positions: Array, rng: np.random.Generator
) -> tuple[NDArray[np.int64], Array]:
    """Larger changes: several units at once, children of two members, the method everywhere."""
    points = []
    for _ in range(600):
        one, two = rng.integers(len(options), size=2)
        point = Point(options[one], float(positions[one]))
        if rng.random() < 0.3:
            other = Point(options[two], float(positions[two]))
            point = space.neighborhood.crossover(point, other, rng)
        for _ in range(int(rng.integers(1, 4))):
            point = space.neighborhood.mutate(point, rng)
        points.append(point)
    return np.array([g.options for g in points]), np.array([g.position for g in points])
