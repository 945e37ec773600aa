"""SearchSpace: from YAML and a topology to the candidates that can be tried."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from autopeft.costs import Topology
from autopeft.plan import MODEL, Candidate, TrainSettings
from autopeft.searcher.space import initial_design
from autopeft.searcher.space.config import SpaceSource, available_spaces, read_source
from autopeft.searcher.space.encoding import Codec, Genome, snap
from autopeft.searcher.space.grid import Grid, build_grid
from autopeft.searcher.space.moves import Mover
from autopeft.searcher.space.sampling import Drawer

__all__ = ["SearchSpace", "available_spaces"]


class SearchSpace:
    """Every candidate a search may try on one model. Make one with `from_source`.

    Args:
        source: The space as written.
        topology: Where adapters can go.
        base: Training settings every candidate shares (steps, batch size, ...).

    Attributes:
        grid: Units and options.
        codec: Genomes into candidates and parameters, and back.
        drawer: Random genomes.
        mover: Neighbors and children of genomes.
    """

    def __init__(self, source: SpaceSource, topology: Topology, base: TrainSettings) -> None:
        self.source = source
        self.topology = topology
        self.base = base
        self.grid: Grid = build_grid(source, topology)
        self.codec = Codec(source, self.grid, base, has_head=topology.head_params > 0)
        self.drawer = Drawer(source, self.grid, topology.head_params)
        self.mover = Mover(source, self.grid, self.drawer)

    @classmethod
    def from_source(
        cls,
        source: str | Path | Mapping[str, Any],
        topology: Topology,
        *,
        steps: int = 100,
        batch_size: int = 16,
        weight_decay: float = 0.0,
        warmup_fraction: float = 0.05,
    ) -> SearchSpace:
        """The space of that name (`available_spaces()`), in that file, or in that mapping.

        Raises:
            SpaceError: for any mistake, naming field, value and remedy.
        """
        base = TrainSettings(
            learning_rate=1e-3,
            steps=steps,
            batch_size=batch_size,
            weight_decay=weight_decay,
            warmup_fraction=warmup_fraction,
        )
        return cls(read_source(source), topology, base)

    @property
    def name(self) -> str:
        """The shipped space's or the file's name; "custom" for a mapping."""
        return self.source.name

    def describe(self) -> str:
        """One line: what shares a choice, methods, number of architectures, range of costs."""
        low, high = self.cost_range()
        log10 = float(np.log10(self.grid.legal.sum(axis=1)).sum())
        return (
            f"{len(self.grid.units)} choices ({self.source.granularity}), "
            f"methods {', '.join(self.methods)}, about 1e{log10:.0f} architectures, "
            f"{low:,.0f} to {high:,.0f} trainable parameters"
        )

    # --- size ------------------------------------------------------------------------------------

    @property
    def n_architectures(self) -> float:
        """How many plans there are; may be inf. Limits on adapted blocks are not counted."""
        return float(np.prod(self.grid.legal.sum(axis=1).astype(float)))

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods in use."""
        return self.grid.methods

    @property
    def prompt_sizes(self) -> tuple[int, ...]:
        """Sizes of the prompts that plans may have: only those need a price."""
        ranks = {s.rank for specs in self.grid.sites.values() for s in specs if s.role == MODEL}
        return tuple(sorted(ranks))

    def cost_range(self) -> tuple[float, float]:
        """Fewest and most trainable parameters, a new head included."""
        return self.drawer.cost_range()

    # --- candidates ------------------------------------------------------------------------------

    def draw(self, rng: np.random.Generator) -> Candidate:
        """Uniformly, unit by unit. Costs crowd in the middle of the axis; see `draw_stratified`."""
        return self.codec.candidate(self.drawer.uniform(rng))

    def draw_stratified(self, rng: np.random.Generator) -> Candidate:
        """First the cost, uniform on a log scale, then a plan that spends it."""
        return self.codec.candidate(self.drawer.stratified(rng))

    def draw_at_cost(self, rng: np.random.Generator, log_cost: float) -> Candidate:
        """A plan with about exp(log_cost) trainable parameters."""
        return self.codec.candidate(self.drawer.at_cost(rng, log_cost))

    def mutate(self, candidate: Candidate, rng: np.random.Generator) -> Candidate:
        """A neighbor of a candidate."""
        return self.codec.candidate(self.mover.mutate(self.codec.genome(candidate), rng))

    def crossover(self, first: Candidate, second: Candidate, rng: np.random.Generator) -> Candidate:
        """A child of two candidates."""
        parents = self.codec.genome(first), self.codec.genome(second)
        return self.codec.candidate(self.mover.crossover(*parents, rng))

    def neighbors_in_rate(self, candidate: Candidate) -> tuple[Candidate, ...]:
        """The same architecture at a lower and at a higher learning rate."""
        near = self.mover.neighbors_in_rate(self.codec.genome(candidate))
        return tuple(self.codec.candidate(genome) for genome in near)

    def enumerate(self, limit: int) -> Iterator[Candidate]:
        """All candidates one after the other, learning rates in coarse steps; at most `limit`.

        For spaces so small that drawing finds nothing new any more.
        """
        positions = [snap(step / 20) for step in range(21)]
        fitting = [np.flatnonzero(row) for row in self.grid.legal]
        least = 0 if self.source.include_empty else 1
        points = itertools.product(
            itertools.product(*fitting),
            positions,
            range(len(self.source.alpha_ratio)),
            range(len(self.source.dropout)),
        )
        for options, position, alpha, dropout in itertools.islice(points, limit):
            if sum(option > 0 for option in options) >= least:
                yield self.codec.candidate(
                    Genome(np.array(options, dtype=np.int64), position, alpha, dropout)
                )

    # --- parameters ----------------------------------------------------------------------------

    def encode(self, candidate: Candidate) -> dict[str, Any]:
        """Legible parameters such as `layer.03.method`, `layer.03.rank`, `lr_position`.

        Raises:
            SpaceError: if the candidate is not a point of this space.
        """
        return self.codec.params(self.codec.genome(candidate))

    def decode(self, params: Mapping[str, Any]) -> Candidate:
        """The candidate of such parameters."""
        return self.codec.candidate(self.codec.from_params(params))

    @cached_property
    def parameters(self) -> dict[str, dict[str, Any]]:
        """Every parameter as plain data; see `Codec.parameters`."""
        return self.codec.parameters()

    # --- known recipes ---------------------------------------------------------------------------

    def baselines(self, n_max: int | None = None) -> tuple[Candidate, ...]:
        """The tuned-LoRA grid, most telling first; empty if the space has no LoRA."""
        return tuple(self.codec.candidate(g) for g in initial_design.baselines(self.codec, n_max))

    def reference(self) -> Candidate:
        """No adapter."""
        return self.codec.candidate(initial_design.reference(self.codec))

    def portfolio(self, n_max: int | None = None) -> tuple[Candidate, ...]:
        """Strong known recipes besides LoRA."""
        return tuple(self.codec.candidate(g) for g in initial_design.portfolio(self.codec, n_max))
