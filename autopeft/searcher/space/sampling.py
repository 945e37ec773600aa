"""Random points of a space: independent samples, mutations and crossovers."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from autopeft.plan import MODEL
from autopeft.searcher.space.config import SpaceConfig
from autopeft.searcher.space.encoding import Point, snap
from autopeft.searcher.space.grid import Grid

Options = NDArray[np.int64]


class PointSampler:
    """Samples random points of a grid, uniformly or at a given cost.

    Cost here means trainable parameters, a new head included.

    Args:
        config: Limits on adapted blocks, choices of training settings.
        grid: Units and options.
        head_params: Parameters that every candidate trains.
    """

    def __init__(self, config: SpaceConfig, grid: Grid, head_params: int) -> None:
        self._config = config
        self._grid = grid
        self._head = head_params
        blocks = sorted({layer for unit in grid.units for layer in unit.layers})
        self._covers = np.array([[block in unit.layers for block in blocks] for unit in grid.units])
        self._is_whole_model = np.array([unit.roles == (MODEL,) for unit in grid.units])
        self._max_adapted = min(config.max_adapted_layers or len(blocks), len(blocks))
        least = max(config.min_adapted_layers, 0 if config.include_empty else 1)
        self._min_adapted = min(least, self._max_adapted)

    def n_params(self, options: Options) -> NDArray[np.float64]:
        """Return the trainable parameters of options of shape (..., n_units); shape (...)."""
        return self._grid.total_params(options) + self._head

    def cost_range(self) -> tuple[float, float]:
        """Return the fewest and the most trainable parameters of a plan that is not empty."""
        grid = self._grid
        costs = grid.params[:, 1:]
        finite = np.where(np.isfinite(costs), costs, 0.0)
        highest = np.sort(finite.max(axis=1))[::-1]
        # A single unit pays for everything it shares.
        alone = grid.params - grid.spread + grid.shares @ grid.group_params
        return float(alone[:, 1:].min() + self._head), float(highest.sum() + self._head)

    def uniform(self, rng: np.random.Generator) -> Point:
        """Sample each unit on its own: a method (or none), then one of its options."""
        grid = self._grid
        options = np.zeros(len(grid.units), dtype=np.int64)
        for unit in range(len(grid.units)):
            legal = np.flatnonzero(grid.legal[unit])
            method = rng.choice(np.unique(grid.method_of[legal]))
            options[unit] = rng.choice(legal[grid.method_of[legal] == method])
        return self._complete(options, rng)

    def at_cost(self, rng: np.random.Generator, log_cost: float, n_tries: int = 3) -> Point:
        """Sample a plan whose number of trainable parameters is close to a target.

        Blocks, methods and placements are chosen first, then ranks that fit the target, which is a
        natural logarithm and includes the head. The closest of at most `n_tries` is returned.
        """
        best, best_gap = self._try_at_cost(rng, log_cost), math.inf
        for attempt in range(n_tries):
            options = best if attempt == 0 else self._try_at_cost(rng, log_cost)
            gap = abs(math.log(max(float(self.n_params(options)), 1.0)) - log_cost)
            if gap < best_gap:
                best, best_gap = options, gap
            if gap < 0.05:
                break
        return self._complete(best, rng)

    def stratified(self, rng: np.random.Generator) -> Point:
        """Sample a cost, uniform on a log scale over the space's range, then a plan at it."""
        low, high = self.cost_range()
        return self.at_cost(rng, rng.uniform(math.log(max(low, 1.0)), math.log(max(high, 1.0))))

    def _try_at_cost(self, rng: np.random.Generator, log_cost: float) -> Options:
        grid = self._grid
        target = math.exp(log_cost) - self._head
        options = np.zeros(len(grid.units), dtype=np.int64)
        active = np.flatnonzero(self._random_units(rng) & grid.legal[:, 1:].any(axis=1))
        if not len(active):
            return options
        choices = grid.by_rank[self._random_kinds(rng, active)]  # (active, ranks), padded with -1
        costs = np.where(choices >= 0, grid.params[active[:, None], choices], np.inf)
        lowest = costs.min(axis=1)
        order = rng.permutation(len(active))
        # Leave units out where even their smallest ranks cost too much.
        running = np.cumsum(lowest[order])
        n_kept = max(1, int(np.searchsorted(running, target * 1.05, side="right")))
        kept = order[:n_kept]
        if n_kept == 1 and lowest[kept[0]] > target * 1.05:
            kept = np.array([int(np.argmin(lowest))])
        unevenness = rng.choice([0.0, 0.5, 1.2])
        weights = np.exp(unevenness * rng.standard_normal(len(kept)))
        picks = allocate(costs[kept], weights, target)
        options[active[kept]] = choices[kept, picks]
        return options

    def _random_units(self, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Return a mask of adapted units: all, the upper ones, a window, or scattered ones."""
        n = len(self._grid.units)
        pattern = rng.choice(["all", "upper", "window", "scattered"], p=[0.45, 0.15, 0.15, 0.25])
        mask = np.ones(n, dtype=bool)
        if pattern == "upper":
            mask[: rng.integers(0, n)] = False
        elif pattern == "window":
            start, stop = np.sort(rng.integers(0, n + 1, size=2))
            mask[:] = False
            mask[start : max(stop, start + 1)] = True
        elif pattern == "scattered":
            mask = rng.random(n) < rng.uniform(0.2, 1.0)
        if 0 < self._is_whole_model.sum() < n:
            # An adapter of the whole model (a prompt) is in 40 % of the plans, alone in half of
            # those.
            chance = rng.random()
            mask[self._is_whole_model] = chance < 0.4
            mask[~self._is_whole_model] &= chance >= 0.2
        if not mask.any():
            mask[rng.integers(n)] = True
        return mask

    def _random_kinds(self, rng: np.random.Generator, active: Options) -> Options:
        """Return the index of a kind for each active unit; a plan often uses one or two methods."""
        grid = self._grid
        n_methods = len(grid.methods)
        n_preferred = min(int(rng.choice([1, 2, n_methods], p=[0.5, 0.25, 0.25])), n_methods)
        preferred = rng.permutation(n_methods)[:n_preferred]
        shared = rng.integers(len(grid.placement_names)) if rng.random() < 0.6 else -1
        method, placement = grid.kinds[:, 0], grid.kinds[:, 1]
        score = rng.random((len(active), n_methods))[:, method]
        score = score + 1e-3 * rng.random((len(active), len(method))) + 1e-2 * (placement == shared)
        score = score + 10.0 * np.isin(method, preferred)
        chosen: Options = np.where(grid.legal_kinds[active], score, -np.inf).argmax(axis=1)
        return chosen

    def other_option(self, unit: int, current: int, rng: np.random.Generator) -> int:
        """Choose another option for a unit.

        Mostly one that shares two of method, placement and rank with the current one.
        """
        grid = self._grid
        legal = np.flatnonzero(grid.legal[unit])
        if current and rng.random() < 0.7:
            n_shared = (grid.method_of[legal] == grid.method_of[current]).astype(int)
            n_shared += grid.placement_of[legal] == grid.placement_of[current]
            n_shared += grid.rank_of[legal] == grid.rank_of[current]
            legal = legal[(n_shared >= 2) & (legal != current)]
        else:
            legal = legal[legal != current]
        return int(rng.choice(legal)) if len(legal) else current

    def repair(self, options: Options, rng: np.random.Generator) -> Options:
        """Change as few units as needed to keep the limits on adapted blocks, in place."""
        for _ in range(2 * len(options)):
            n_adapted = int(self._covers[options > 0].any(axis=0).sum())
            if n_adapted > self._max_adapted:
                options[rng.choice(np.flatnonzero(options > 0))] = 0
            elif n_adapted < self._min_adapted:
                unit = int(rng.choice(np.flatnonzero(options == 0)))
                options[unit] = self.other_option(unit, 0, rng)
            else:
                break
        return options

    def _complete(self, options: Options, rng: np.random.Generator) -> Point:
        """Add random training settings."""
        return Point(
            self.repair(options, rng),
            snap(float(rng.random())),
            int(rng.integers(len(self._config.alphas[1]))),
            int(rng.integers(len(self._config.dropout))),
        )


class Neighborhood:
    """Mutates and crosses points of a grid.

    Args:
        config: Choices of training settings.
        grid: Units and options.
        sampler: Keeps the limits on adapted blocks.
    """

    def __init__(self, config: SpaceConfig, grid: Grid, sampler: PointSampler) -> None:
        self._config = config
        self._grid = grid
        self._sampler = sampler

    def mutate(self, point: Point, rng: np.random.Generator) -> Point:
        """Change a few units, or all units in the same way, or the training settings."""
        options = point.options.copy()
        position, alpha, dropout = point.position, point.alpha, point.dropout
        mutation = rng.choice(7, p=[0.3, 0.15, 0.12, 0.13, 0.1, 0.1, 0.1])
        if mutation == 0:
            for unit in rng.choice(
                len(options), size=min(len(options), 1 + rng.poisson(0.7)), replace=False
            ):
                options[unit] = self._sampler.other_option(int(unit), int(options[unit]), rng)
        elif mutation == 1:
            self._step_ranks(options, rng, share=1.0)
        elif mutation == 2:
            self._step_ranks(options, rng, share=float(rng.uniform(0.1, 0.6)))
        elif mutation == 3:
            self._toggle(options, rng)
        elif mutation == 4:
            self._switch_kind(options, rng)
        elif mutation == 5:
            self._copy_adjacent(options, rng)
        if mutation == 6 or rng.random() < 0.35:
            position = snap(position + rng.normal(0.0, rng.choice([0.03, 0.12])))
            if rng.random() < 0.2:
                alpha = int(rng.integers(len(self._config.alphas[1])))
                dropout = int(rng.integers(len(self._config.dropout)))
        return Point(self._sampler.repair(options, rng), position, alpha, dropout)

    def crossover(self, first: Point, second: Point, rng: np.random.Generator) -> Point:
        """Combine two points: one-point or uniform crossover of units, settings from either."""
        n = len(first.options)
        if rng.random() < 0.5:
            mask = np.arange(n) < rng.integers(0, n + 1)
        else:
            mask = rng.random(n) < 0.5
        options = np.where(mask, first.options, second.options)
        donor = first if rng.random() < 0.5 else second
        is_mean = rng.random() < 0.3
        position = snap((first.position + second.position) / 2) if is_mean else donor.position
        return Point(self._sampler.repair(options, rng), position, donor.alpha, donor.dropout)

    def other_rates(self, point: Point, steps: tuple[float, ...] = (-0.15, 0.15)) -> list[Point]:
        """Return the same architecture at other learning rates."""
        positions = {snap(point.position + step) for step in steps} - {point.position}
        return [
            Point(point.options, position, point.alpha, point.dropout)
            for position in sorted(positions)
        ]

    def _step_ranks(self, options: Options, rng: np.random.Generator, share: float) -> None:
        """Move about a share of the units to the next lower or the next higher rank."""
        steps = self._grid.adjacent_ranks[options, int(rng.integers(2))]
        is_legal = self._grid.legal[np.arange(len(options)), steps]
        chosen = is_legal & (rng.random(len(options)) < share)
        options[chosen] = steps[chosen]

    def _toggle(self, options: Options, rng: np.random.Generator) -> None:
        """Add or remove the adapters of one or two units; a new one copies an existing one."""
        on, off = np.flatnonzero(options > 0), np.flatnonzero(options == 0)
        for _ in range(1 + int(rng.random() < 0.4)):
            if len(on) and (not len(off) or rng.random() < 0.5):
                options[rng.choice(on)] = 0
            elif len(off):
                unit = int(rng.choice(off))
                copied = options[rng.choice(on)] if len(on) else 0
                is_legal = copied and self._grid.legal[unit, copied]
                options[unit] = copied if is_legal else self._sampler.other_option(unit, 0, rng)

    def _switch_kind(self, options: Options, rng: np.random.Generator) -> None:
        """Give all adapted units another method or placement at about the same cost."""
        grid = self._grid
        rows = np.arange(len(options))
        methods, placements = grid.kinds[:, 0], grid.kinds[:, 1]
        if rng.random() < 0.6:
            is_new = methods == rng.integers(len(grid.methods))
            is_kept = placements == grid.placement_of[options][:, None]
        else:
            is_new = placements == rng.integers(len(grid.placement_names))
            is_kept = methods == grid.method_of[options][:, None]
        wanted = np.where(is_new & grid.legal_kinds, 1 + is_kept, 0)  # (units, kinds)
        kinds = wanted.argmax(axis=1)
        others = grid.nearest_cost[options, kinds]
        is_legal = (options > 0) & (wanted[rows, kinds] > 0) & grid.legal[rows, others]
        options[is_legal] = others[is_legal]

    def _copy_adjacent(self, options: Options, rng: np.random.Generator) -> None:
        """Copy the option of the unit above or below."""
        if len(options) > 1:
            unit = int(rng.integers(len(options)))
            other = int(np.clip(unit + rng.choice([-1, 1]), 0, len(options) - 1))
            if self._grid.legal[unit, options[other]]:
                options[unit] = options[other]


def allocate(
    costs: NDArray[np.float64], weights: NDArray[np.float64], total: float
) -> NDArray[np.int64]:
    """Pick one cost per row such that rows share a total in proportion to their weights.

    Args:
        costs: Shape (rows, choices), ascending along a row, padded with inf.
        weights: Shape (rows,), positive.
        total: Target of the sum, in the costs' unit.

    Returns:
        Index of the pick in each row, shape (rows,). The sum is close to the total.
    """
    logs = np.log(costs)
    shares = np.log(weights / weights.sum() * max(total, 1.0))
    low, high, best = -4.0, 4.0, (math.inf, np.zeros(len(costs), dtype=np.int64))
    for _ in range(14):
        middle = (low + high) / 2
        picks = np.abs(logs - (shares + middle)[:, None]).argmin(axis=1)
        reached = float(np.take_along_axis(costs, picks[:, None], 1).sum())
        gap = abs(math.log(reached / max(total, 1.0)))
        if gap < best[0]:
            best = (gap, picks)
        low, high = (low, middle) if reached > total else (middle, high)
    return best[1]
