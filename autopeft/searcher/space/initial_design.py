"""The initial design: LoRA baselines and a portfolio of other methods."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from autopeft.searcher.space.encoding import Encoder, Point, snap

N_BASELINES, N_PORTFOLIO = 4, 10
"""LoRA baselines, and other known recipes, that a search begins with."""

_RATE_POSITIONS = (0.5, 0.75, 0.25, 0.9, 0.1)
"""The middle comes first: the ranges are centered on values that usually work."""

_EARLY = 1 / 6
"""Depth of an early layer, as a share of the layers."""


def single_method(
    encoder: Encoder,
    method: str,
    placement: str | None,
    rank: int,
    position: float,
    last: int | None = None,
    among: Collection[int] | None = None,
) -> Point | None:
    """Return the point with one method in all units, at the nearest legal rank.

    Args:
        encoder: Encoder of the space.
        method: Name of the method.
        placement: Name of the placement; None for any.
        rank: The rank that is wanted.
        position: Learning-rate position.
        last: Number of units from the end; None for all.
        among: Indices of the units that may be adapted; None for all.

    Returns:
        None if the method is legal in none of them.
    """
    grid = encoder.grid
    options = np.zeros(len(grid.units), dtype=np.int64)
    distance = {
        o: abs(np.log(max(option.rank, 1) / max(rank, 1)))
        for o, option in enumerate(grid.options)
        if option.method == method and placement in (None, option.placement)
    }
    for unit in range(0 if last is None else max(len(options) - last, 0), len(options)):
        if among is None or unit in among:
            legal = [o for o in distance if grid.legal[unit, o]]
            options[unit] = min(legal, key=distance.__getitem__, default=0)
    return Point(options, snap(position)) if options.any() else None


def baselines(encoder: Encoder, n_max: int | None = None) -> tuple[Point, ...]:
    """Return the LoRA grid: two placements x ranks x learning rates, most informative first.

    The first four cover both placements, two rates, and the largest rank, where the best LoRA is in
    most cases. Empty if the space has no LoRA; at most `n_max`.
    """
    ranks = lora_ranks(encoder)
    if not ranks:
        return ()
    middle = min(ranks, key=lambda r: abs(np.log(r / 8)))
    places = lora_placements(encoder)
    narrow, wide = places[0], places[-1]
    rows = [
        (narrow, middle, 0.5),
        (wide, ranks[-1], 0.5),
        (wide, middle, 0.75),
        (narrow, middle, 0.75),
        *(
            (place, rank, position)
            for rank in (middle, ranks[0], ranks[-1], *ranks)
            for position in _RATE_POSITIONS
            for place in places
        ),
    ]
    return unique(single_method(encoder, "lora", *row) for row in dict.fromkeys(rows))[:n_max]


def lora_choices(encoder: Encoder) -> tuple[Point, ...]:
    """Return all LoRA baselines: both placements, all ranks, nine rates."""
    return unique(
        single_method(encoder, "lora", place, rank, position / 10)
        for rank in lora_ranks(encoder)
        for place in lora_placements(encoder)
        for position in range(1, 10)
    )


def lora_ranks(encoder: Encoder) -> list[int]:
    """Return the ranks of LoRA in the space, ascending; empty if it has no LoRA."""
    return sorted({option.rank for option in encoder.grid.options if option.method == "lora"})


def lora_placements(encoder: Encoder) -> Sequence[str | None]:
    """Return the usual narrow and wide placements of LoRA: q,v and all linear modules."""
    if encoder.config.granularity == "site":
        return (None,)
    grid = encoder.grid
    places = dict.fromkeys(o.placement for o in grid.options if o.method == "lora")
    sizes = {place: len(grid.placements[place]) for place in places}
    narrow = min(sizes, key=lambda place: (place != "qv", sizes[place]))
    wide = max(sizes, key=lambda place: sizes[place])
    return tuple(dict.fromkeys((narrow, wide)))


def portfolio(encoder: Encoder, n_max: int | None = None) -> tuple[Point, ...]:
    """Return a portfolio: every other method everywhere, and small LoRAs in part of the model.

    Each is at its smallest size: the LoRA baselines already cover medium and large ones. On the
    synthetic landscapes of `examples/benchmarks/`, small sizes are a better start than medium sizes
    or a mixture. LoRA sits in the last layers, in one early feed-forward module, and in the
    feed-forward modules alone. The methods come first: where few starts fit, they tell most.
    """
    grid = encoder.grid
    half = max(1, len(grid.units) // 2)
    rows: list[Point | None] = []
    for name in (m for m in grid.methods if m != "lora"):
        places = [o.placement for o in grid.options if o.method == name]
        smallest = min(o.rank for o in grid.options if o.method == name)
        widest = max(places, key=lambda place: len(grid.placements[place]))
        whole = None if encoder.config.granularity == "site" else widest
        rows.append(single_method(encoder, name, whole, smallest, 0.5))
    if "lora" in grid.methods:
        narrow, wide = lora_placements(encoder)[0], lora_placements(encoder)[-1]
        rows += [
            single_method(encoder, "lora", wide, 1, 0.6, half),
            single_method(encoder, "lora", narrow, 1, 0.6, max(1, half // 2)),
            early_feed_forward(encoder, 0.6),
            feed_forward(encoder, 0.6),
        ]
    return unique(rows)[:n_max]


def early_feed_forward(encoder: Encoder, position: float) -> Point | None:
    """Return the smallest LoRA at the `mlp.down` of one early layer, or around it.

    Source: DomLoRA (arXiv 2605.06183): a single shallow `mlp.down`, with 0.7 % of the parameters of
    LoRA everywhere.
    """
    grid = encoder.grid
    holds = [place for place, roles in grid.placements.items() if "mlp.down" in roles]
    units = [u for u in early_units(encoder) if "mlp.down" in grid.units[u].roles]
    place = min(holds, key=lambda place: len(grid.placements[place]), default=None)
    return single_method(encoder, "lora", place, 1, position, among=units) if units else None


def early_units(encoder: Encoder) -> list[int]:
    """Return the indices of the units of one early layer; empty if a unit is the whole model."""
    units = encoder.grid.units
    layers = tuple(sorted({layer for unit in units for layer in unit.layers}))
    if len(layers) < 2:
        return []
    early = layers[max(1, round(_EARLY * len(layers)))]
    return [i for i, unit in enumerate(units) if early in unit.layers and unit.layers != layers]


def feed_forward(encoder: Encoder, position: float) -> Point | None:
    """Return the smallest LoRA in all feed-forward modules and no others."""
    grid = encoder.grid
    holds = [
        place
        for place, roles in grid.placements.items()
        if all(role.startswith("mlp.") for role in roles)
    ]
    if encoder.config.granularity == "site":
        units = [i for i, unit in enumerate(grid.units) if unit.roles[0].startswith("mlp.")]
        return single_method(encoder, "lora", None, 1, position, among=units)
    place = max(holds, key=lambda place: len(grid.placements[place]), default=None)
    return None if place is None else single_method(encoder, "lora", place, 1, position)


def unique(points: Iterable[Point | None]) -> tuple[Point, ...]:
    """Drop duplicates and None, keep the order."""
    return tuple({point.key: point for point in points if point is not None}.values())
