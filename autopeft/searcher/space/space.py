"""SearchSpace: all candidates that a search may try on one model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopeft.costs import Topology
from autopeft.errors import SpaceError
from autopeft.plan import MODEL, Candidate, TrainSettings
from autopeft.searcher.space import initial_design
from autopeft.searcher.space.config import SpaceConfig, available_spaces, read_config
from autopeft.searcher.space.encoding import Encoder, Point, snap
from autopeft.searcher.space.grid import Grid, build_grid
from autopeft.searcher.space.sampling import Neighborhood, PointSampler
from autopeft.serving.servers import find_server

__all__ = ["SearchSpace", "available_spaces"]


class SearchSpace:
    """All candidates that a search may try on one model. Use `from_source` to create one.

    Args:
        config: The space as written.
        topology: The sites of the model.
        base: Training settings that every candidate shares (steps, batch size, ...).
        servable: Name of a server; plans that it cannot load are not in the space.

    Attributes:
        grid: Units and options.
        encoder: Converts points to candidates and parameters, and back.
        point_sampler: Samples random points.
        neighborhood: Mutates and crosses points.

    Example:
        >>> topology = autopeft.Topology(2, {"attn.q": (64, 64), "attn.v": (64, 64)})
        >>> space = autopeft.SearchSpace.from_source({"methods": ["lora", "ia3"]}, topology)
        >>> space.methods
        ('lora', 'ia3')
    """

    def __init__(
        self,
        config: SpaceConfig,
        topology: Topology,
        base: TrainSettings,
        servable: str | None = None,
    ) -> None:
        if not isinstance(topology, Topology):
            remedy = 'use e.g. Topology(2, {"attn.q": (64, 64)})'
            raise SpaceError("topology", topology, "must be a Topology", remedy)
        self.config = config
        self.topology = topology
        self.base = base
        self.grid: Grid = build_grid(
            config, topology, None if servable is None else find_server(servable, field="servable")
        )
        self.encoder = Encoder(config, self.grid, base, has_head=topology.head_params > 0)
        self.point_sampler = PointSampler(config, self.grid, topology.head_params)
        self.neighborhood = Neighborhood(config, self.grid, self.point_sampler)

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
        servable: str | None = None,
    ) -> SearchSpace:
        """Return the space of that name (`available_spaces()`), in that file, or in that mapping.

        Raises:
            SpaceError: for any mistake, with field, value and remedy.
        """
        base = TrainSettings(
            learning_rate=1e-3,
            steps=steps,
            batch_size=batch_size,
            weight_decay=weight_decay,
            warmup_fraction=warmup_fraction,
        )
        return cls(read_config(source), topology, base, servable)

    @property
    def name(self) -> str:
        """The name of the shipped space or of the file; "custom" for a mapping."""
        return self.config.name

    def describe(self) -> str:
        """Return one line: granularity, methods, number of architectures, range of costs."""
        low, high = self.cost_range()
        log10 = float(np.log10(self.grid.legal.sum(axis=1)).sum())
        return (
            f"{len(self.grid.units)} choices ({self.config.granularity}), "
            f"methods {', '.join(self.methods)}, about 1e{log10:.0f} architectures, "
            f"{low:,.0f} to {high:,.0f} trainable parameters"
        )

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods in use."""
        return self.grid.methods

    @property
    def left_out(self) -> tuple[str, ...]:
        """The methods of the space as written that are not in use."""
        return tuple(name for name in self.config.methods if name not in self.methods)

    @property
    def prompt_sizes(self) -> tuple[int, ...]:
        """The sizes of prompts in the space: only those need to be priced."""
        ranks = {s.rank for specs in self.grid.sites.values() for s in specs if s.role == MODEL}
        return tuple(sorted(ranks))

    def cost_range(self) -> tuple[float, float]:
        """Return the fewest and the most trainable parameters, a new head included."""
        return self.point_sampler.cost_range()

    def n_params(self, options: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the trainable parameters of options of shape (..., n_units); shape (...)."""
        return self.point_sampler.n_params(options)

    def sample(self, rng: np.random.Generator) -> Candidate:
        """Sample each unit uniformly. Most costs are then near the middle of their range."""
        return self.encoder.to_candidate(self.point_sampler.uniform(rng))

    def sample_stratified(self, rng: np.random.Generator) -> Candidate:
        """Sample a cost, uniform on a log scale, then a candidate at that cost."""
        return self.encoder.to_candidate(self.point_sampler.stratified(rng))

    def enumerate(self, limit: int) -> Iterator[Point]:
        """Yield all points in order, with learning rates in coarse steps; at most `limit`.

        For spaces that are too small for random sampling to find new points.
        """
        positions = [snap(step / 20) for step in range(21)]
        legal = [np.flatnonzero(row) for row in self.grid.legal]
        least = 0 if self.config.include_empty else 1
        alphas, dropouts = range(len(self.config.alphas[1])), range(len(self.config.dropout))
        # Not one product of products: it would keep all architectures in memory.
        rows = (
            (options, settings)
            for options in itertools.product(*legal)
            for settings in itertools.product(positions, alphas, dropouts)
        )
        for options, settings in itertools.islice(rows, limit):
            if sum(option > 0 for option in options) >= least:
                yield Point(np.array(options, dtype=np.int64), *settings)

    def encode(self, candidate: Candidate) -> dict[str, Any]:
        """Return readable parameters such as `layer.03.method`, `layer.03.rank`, `lr_position`.

        Raises:
            SpaceError: if the candidate is not in this space.
        """
        return self.encoder.to_params(self.encoder.from_candidate(candidate))

    def decode(self, params: Mapping[str, Any]) -> Candidate:
        """Return the candidate of such parameters."""
        return self.encoder.to_candidate(self.encoder.from_params(params))

    @property
    def parameters(self) -> dict[str, dict[str, Any]]:
        """Every parameter as plain data; see `Encoder.parameters`."""
        return self.encoder.parameters

    def baselines(self, n_max: int | None = None) -> tuple[Candidate, ...]:
        """Return the LoRA grid, most informative first; empty if the space has no LoRA."""
        return tuple(map(self.encoder.to_candidate, initial_design.baselines(self.encoder, n_max)))

    def reference(self) -> Candidate:
        """Return the candidate without adapters."""
        return self.encoder.to_candidate(Point(np.zeros(len(self.grid.units), dtype=np.int64)))

    def portfolio(self, n_max: int | None = None) -> tuple[Candidate, ...]:
        """Return good starting points of methods other than LoRA."""
        return tuple(map(self.encoder.to_candidate, initial_design.portfolio(self.encoder, n_max)))
