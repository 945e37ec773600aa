"""A search space on plain shapes, for checks that train nothing."""

from __future__ import annotations

from autopeft.costs import PriceTable, Topology
from autopeft.searcher.space.space import SearchSpace

TOPOLOGY = Topology(
    4,
    {"attn.q": (64, 64), "attn.v": (64, 64), "mlp.up": (128, 64), "mlp.down": (64, 128)},
    head_params=130,
)


def plain_space(steps: int = 9) -> SearchSpace:
    """Return the default space for four small blocks."""
    return SearchSpace.from_source("default", TOPOLOGY, steps=steps, batch_size=4)


def plain_prices() -> PriceTable:
    """Return what its candidates cost."""
    return PriceTable.from_topology(TOPOLOGY, batch_size=4)
