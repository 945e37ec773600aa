"""Random draws: uniform, and at a wanted cost."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from autopeft.plan import MODEL
from autopeft.searcher.space.config import SpaceSource
from autopeft.searcher.space.encoding import Genome, snap
from autopeft.searcher.space.grid import Grid

Options = NDArray[np.int64]


class Drawer:
    """Draws genomes of one grid.

    Costs here are trainable parameters, a new head included: additive over units but for what
    sites share, exact, and in step with every other cost.

    Args:
        source: Limits on adapted blocks, choices of training settings.
        grid: Units and options.
        head_params: Parameters every candidate trains.
    """

    def __init__(self, source: SpaceSource, grid: Grid, head_params: int) -> None:
        self._source = source
        self._grid = grid
        self._head = head_params
        self._blocks = sorted({layer for unit in grid.units for layer in unit.layers})
        self._covers = np.array(
            [[block in unit.layers for block in self._blocks] for unit in grid.units]
        )
        self._is_plan = np.array([unit.roles == (MODEL,) for unit in grid.units])
        self._most = min(source.max_adapted_layers or len(self._blocks), len(self._blocks))
        self._least = max(source.min_adapted_layers, 0 if source.include_empty else 1)
        self._least = min(self._least, self._most)

    # --- what a genome costs ---------------------------------------------------------------------

    def params(self, options: NDArray[np.int64]) -> NDArray[np.float64]:
        """Trainable parameters.

        Args:
            options: Shape (..., n_units).

        Returns:
            Shape (...).
        """
        return self._grid.total_params(options) + self._head

    def cost_range(self) -> tuple[float, float]:
        """Fewest and most trainable parameters of a plan that is not empty."""
        grid = self._grid
        costs = grid.params[:, 1:]
        finite = np.where(np.isfinite(costs), costs, 0.0)
        dearest = np.sort(finite.max(axis=1))[::-1]
        # One unit alone pays for all that it shares.
        alone = grid.params - grid.spread + grid.shares @ grid.group_params
        return float(alone[:, 1:].min() + self._head), float(dearest.sum() + self._head)

    # --- drawing ---------------------------------------------------------------------------------

    def uniform(self, rng: np.random.Generator) -> Genome:
        """Each unit alone: a method (or none) uniformly, then a placement and a rank uniformly."""
        grid = self._grid
        options = np.zeros(len(grid.units), dtype=np.int64)
        for unit in range(len(grid.units)):
            fitting = np.flatnonzero(grid.legal[unit])
            method = rng.choice(np.unique(grid.method_of[fitting]))
            options[unit] = rng.choice(fitting[grid.method_of[fitting] == method])
        return self._finish(options, rng)

    def at_cost(self, rng: np.random.Generator, log_cost: float, n_tries: int = 3) -> Genome:
        """A plan whose trainable parameters come close to a wanted number.

        First which blocks, methods and placements, then ranks such that the sum fits; the closest
        of a few tries.

        Args:
            rng: Source of randomness.
            log_cost: Natural logarithm of the wanted number, head included.
            n_tries: Plans drawn.
        """
        best, best_gap = self._one_at_cost(rng, log_cost), math.inf
        for attempt in range(n_tries):
            options = best if attempt == 0 else self._one_at_cost(rng, log_cost)
            gap = abs(math.log(max(float(self.params(options)), 1.0)) - log_cost)
            if gap < best_gap:
                best, best_gap = options, gap
            if gap < 0.05:
                break
        return self._finish(best, rng)

    def stratified(self, rng: np.random.Generator) -> Genome:
        """First the cost, uniform on a log scale over the space's range; then a plan at it."""
        low, high = self.cost_range()
        return self.at_cost(rng, rng.uniform(math.log(max(low, 1.0)), math.log(max(high, 1.0))))

    def _one_at_cost(self, rng: np.random.Generator, log_cost: float) -> Options:
        grid = self._grid
        wanted = math.exp(log_cost) - self._head
        options = np.zeros(len(grid.units), dtype=np.int64)
        active = np.flatnonzero(self._some_units(rng) & grid.legal[:, 1:].any(axis=1))
        if not len(active):
            return options
        rungs = grid.rungs[self._some_kinds(rng, active)]  # (active, ranks), padded with -1
        costs = np.where(rungs >= 0, grid.params[active[:, None], rungs], np.inf)
        floors = costs.min(axis=1)
        order = rng.permutation(len(active))
        # Too dear even at the smallest ranks: leave blocks out.
        running = np.cumsum(floors[order])
        n_kept = max(1, int(np.searchsorted(running, wanted * 1.05, side="right")))
        kept = order[:n_kept]
        if n_kept == 1 and floors[kept[0]] > wanted * 1.05:
            kept = np.array([int(np.argmin(floors))])
        unevenness = rng.choice([0.0, 0.5, 1.2])
        weights = np.exp(unevenness * rng.standard_normal(len(kept)))
        picks = spend(costs[kept], weights, wanted)
        options[active[kept]] = rungs[kept, picks]
        return options

    def _some_units(self, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Which units are adapted: all, the upper ones, a window, or scattered."""
        n = len(self._grid.units)
        kind = rng.choice(["all", "upper", "window", "scattered"], p=[0.45, 0.15, 0.15, 0.25])
        mask = np.ones(n, dtype=bool)
        if kind == "upper":
            mask[: rng.integers(0, n)] = False
        elif kind == "window":
            start, stop = np.sort(rng.integers(0, n + 1, size=2))
            mask[:] = False
            mask[start : max(stop, start + 1)] = True
        elif kind == "scattered":
            mask = rng.random(n) < rng.uniform(0.2, 1.0)
        if 0 < self._is_plan.sum() < n:
            # An adapter of the model as a whole is in some plans only, alone in half of these.
            chance = rng.random()
            mask[self._is_plan] = chance < 0.4
            mask[~self._is_plan] &= chance >= 0.2
        if not mask.any():
            mask[rng.integers(n)] = True
        return mask

    def _some_kinds(self, rng: np.random.Generator, active: Options) -> Options:
        """A method and placement for each active unit: of one method, two, or any; often shared.

        Returns:
            Index into the grid's kinds, shape (len(active),).
        """
        grid = self._grid
        n_methods = len(grid.methods)
        n_pool = min(int(rng.choice([1, 2, n_methods], p=[0.5, 0.25, 0.25])), n_methods)
        pool = rng.permutation(n_methods)[:n_pool]
        shared = rng.integers(len(grid.placement_names)) if rng.random() < 0.6 else -1
        method, placement = grid.kinds[:, 0], grid.kinds[:, 1]
        score = rng.random((len(active), n_methods))[:, method]
        score = score + 1e-3 * rng.random((len(active), len(method))) + 1e-2 * (placement == shared)
        score = score + 10.0 * np.isin(method, pool)
        chosen: Options = np.where(grid.legal_kinds[active], score, -np.inf).argmax(axis=1)
        return chosen

    def other_option(self, unit: int, now: int, rng: np.random.Generator) -> int:
        """Another option of a unit, mostly one alike in two of method, placement and rank."""
        grid = self._grid
        fitting = np.flatnonzero(grid.legal[unit])
        if now and rng.random() < 0.7:
            is_kin = (grid.method_of[fitting] == grid.method_of[now]).astype(int)
            is_kin += grid.placement_of[fitting] == grid.placement_of[now]
            is_kin += grid.rank_of[fitting] == grid.rank_of[now]
            fitting = fitting[(is_kin >= 2) & (fitting != now)]
        else:
            fitting = fitting[fitting != now]
        return int(rng.choice(fitting)) if len(fitting) else now

    # --- limits ----------------------------------------------------------------------------------

    def repair(self, options: Options, rng: np.random.Generator) -> Options:
        """Bring the number of adapted blocks within the space's limits, changing little."""
        for _ in range(2 * len(options)):
            n_adapted = int(self._covers[options > 0].any(axis=0).sum())
            if n_adapted > self._most:
                options[rng.choice(np.flatnonzero(options > 0))] = 0
            elif n_adapted < self._least:
                unit = int(rng.choice(np.flatnonzero(options == 0)))
                options[unit] = self.other_option(unit, 0, rng)
            else:
                break
        return options

    def _finish(self, options: Options, rng: np.random.Generator) -> Genome:
        return Genome(
            self.repair(options, rng),
            snap(float(rng.random())),
            int(rng.integers(len(self._source.alpha_ratio))),
            int(rng.integers(len(self._source.dropout))),
        )


def spend(
    costs: NDArray[np.float64], weights: NDArray[np.float64], wanted: float
) -> NDArray[np.int64]:
    """Pick one cost a row so that the sum comes near a total and rows share it by weight.

    Args:
        costs: Shape (rows, choices), rising along a row, padded with inf.
        weights: Shape (rows,).
        wanted: The total.

    Returns:
        Index of the pick in each row, shape (rows,).
    """
    logs = np.log(costs)
    shares = np.log(weights / weights.sum() * max(wanted, 1.0))
    low, high, best = -4.0, 4.0, (math.inf, np.zeros(len(costs), dtype=np.int64))
    for _ in range(14):
        middle = (low + high) / 2
        picks = np.abs(logs - (shares + middle)[:, None]).argmin(axis=1)
        total = float(np.take_along_axis(costs, picks[:, None], 1).sum())
        gap = abs(math.log(total / max(wanted, 1.0)))
        if gap < best[0]:
            best = (gap, picks)
        low, high = (low, middle) if total > wanted else (middle, high)
    return best[1]
