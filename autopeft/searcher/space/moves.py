"""Moves from one point of a space to another: neighbors and children."""

from __future__ import annotations

import numpy as np

from autopeft.searcher.space.config import SpaceSource
from autopeft.searcher.space.encoding import Genome, snap
from autopeft.searcher.space.grid import Grid
from autopeft.searcher.space.sampling import Drawer, Options


class Mover:
    """Mutates and crosses genomes of one grid.

    Args:
        source: Choices of training settings.
        grid: Units and options.
        drawer: Keeps the limits on adapted blocks.
    """

    def __init__(self, source: SpaceSource, grid: Grid, drawer: Drawer) -> None:
        self._source = source
        self._grid = grid
        self._drawer = drawer

    def mutate(self, genome: Genome, rng: np.random.Generator) -> Genome:
        """A neighbor: a few units changed, or one change made everywhere, or another rate."""
        options = genome.options.copy()
        position, alpha, dropout = genome.position, genome.alpha, genome.dropout
        moves = rng.choice(7, p=[0.3, 0.15, 0.12, 0.13, 0.1, 0.1, 0.1])
        if moves == 0:
            for unit in rng.choice(
                len(options), size=min(len(options), 1 + rng.poisson(0.7)), replace=False
            ):
                options[unit] = self._drawer.other_option(int(unit), int(options[unit]), rng)
        elif moves == 1:
            self._step_ranks(options, rng, share=1.0)
        elif moves == 2:
            self._step_ranks(options, rng, share=float(rng.uniform(0.1, 0.6)))
        elif moves == 3:
            self._toggle(options, rng)
        elif moves == 4:
            self._recast(options, rng)
        elif moves == 5:
            self._copy_neighbor(options, rng)
        if moves == 6 or rng.random() < 0.35:
            position = snap(position + rng.normal(0.0, rng.choice([0.03, 0.12])))
            if rng.random() < 0.2:
                alpha = int(rng.integers(len(self._source.alpha_ratio)))
                dropout = int(rng.integers(len(self._source.dropout)))
        return Genome(self._drawer.repair(options, rng), position, alpha, dropout)

    def crossover(self, first: Genome, second: Genome, rng: np.random.Generator) -> Genome:
        """A child: each block from one parent (a cut, or at random), the rate from either."""
        n = len(first.options)
        if rng.random() < 0.5:
            mask = np.arange(n) < rng.integers(0, n + 1)
        else:
            mask = rng.random(n) < 0.5
        options = np.where(mask, first.options, second.options)
        donor = first if rng.random() < 0.5 else second
        mixed = rng.random() < 0.3
        position = snap((first.position + second.position) / 2) if mixed else donor.position
        return Genome(self._drawer.repair(options, rng), position, donor.alpha, donor.dropout)

    def neighbors_in_rate(
        self, genome: Genome, steps: tuple[float, ...] = (-0.15, 0.15)
    ) -> list[Genome]:
        """The same architecture at other learning rates."""
        positions = {snap(genome.position + step) for step in steps} - {genome.position}
        return [
            Genome(genome.options, position, genome.alpha, genome.dropout)
            for position in sorted(positions)
        ]

    def _step_ranks(self, options: Options, rng: np.random.Generator, share: float) -> None:
        steps = self._grid.ladder[options, int(rng.integers(2))]
        fits = self._grid.legal[np.arange(len(options)), steps]
        chosen = fits & (rng.random(len(options)) < share)
        options[chosen] = steps[chosen]

    def _toggle(self, options: Options, rng: np.random.Generator) -> None:
        """Adapt one or two units more or fewer; new ones look like those that are there."""
        on, off = np.flatnonzero(options > 0), np.flatnonzero(options == 0)
        for _ in range(1 + int(rng.random() < 0.4)):
            if len(on) and (not len(off) or rng.random() < 0.5):
                options[rng.choice(on)] = 0
            elif len(off):
                unit = int(rng.choice(off))
                model = options[rng.choice(on)] if len(on) else 0
                fits = model and self._grid.legal[unit, model]
                options[unit] = model if fits else self._drawer.other_option(unit, 0, rng)

    def _recast(self, options: Options, rng: np.random.Generator) -> None:
        """Another method or placement for all adapted units, costs kept as near as can be."""
        grid = self._grid
        rows = np.arange(len(options))
        if rng.random() < 0.6:
            method = rng.integers(len(grid.methods))
            wanted = np.where(
                grid.kinds[:, 0] == method,
                1 + (grid.kinds[:, 1] == grid.placement_of[options][:, None]),
                0,
            )
        else:
            place = rng.integers(len(grid.placement_names))
            wanted = np.where(
                grid.kinds[:, 1] == place,
                1 + (grid.kinds[:, 0] == grid.method_of[options][:, None]),
                0,
            )
        wanted = np.where(grid.legal_kinds, wanted, 0)  # (units, kinds)
        kinds = wanted.argmax(axis=1)
        twins = grid.nearest[options, kinds]
        fits = (options > 0) & (wanted[rows, kinds] > 0) & grid.legal[rows, twins]
        options[fits] = twins[fits]

    def _copy_neighbor(self, options: Options, rng: np.random.Generator) -> None:
        if len(options) > 1:
            unit = int(rng.integers(len(options)))
            twin = int(np.clip(unit + rng.choice([-1, 1]), 0, len(options) - 1))
            if self._grid.legal[unit, options[twin]]:
                options[unit] = options[twin]
