"""The initial design: LoRA baselines, the reference and a portfolio of other methods."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from autopeft.searcher.space.encoding import Encoder, Point, snap

_RATE_POSITIONS = (0.5, 0.75, 0.25, 0.9, 0.1)
"""The middle comes first: the ranges are centered on values that usually work."""


def reference(encoder: Encoder) -> Point:
    """Return the point without any adapter."""
    return Point(np.zeros(len(encoder.grid.units), dtype=np.int64))


def single_method(
    encoder: Encoder,
    method: str,
    placement: str | None,
    rank: int,
    position: float,
    last: int | None = None,
) -> Point | None:
    """Return the point with one method in all units (or the last ones), at the nearest legal rank.

    Returns:
        None if the method is legal in none of these units.
    """
    grid = encoder.grid
    options = np.zeros(len(grid.units), dtype=np.int64)
    names = [
        o
        for o, option in enumerate(grid.options)
        if option.method == method and placement in (None, option.placement)
    ]
    first = 0 if last is None else len(options) - last
    for unit in range(max(first, 0), len(options)):
        legal = [o for o in names if grid.legal[unit, o]]
        if legal:
            options[unit] = min(
                legal, key=lambda o: abs(np.log(max(grid.options[o].rank, 1) / max(rank, 1)))
            )
    return Point(options, snap(position)) if options.any() else None


def baselines(encoder: Encoder, n_max: int | None = None) -> tuple[Point, ...]:
    """Return the LoRA grid: two placements x ranks x learning rates, most informative first.

    The first four cover both placements at two rates, the next ones other ranks. Empty if the space
    has no LoRA.

    Args:
        encoder: Of the space.
        n_max: Maximum number of points; None for the whole grid.
    """
    grid = encoder.grid
    if "lora" not in grid.methods:
        return ()
    ranks = sorted({option.rank for option in grid.options if option.method == "lora"})
    middle = min(ranks, key=lambda r: abs(np.log(r / 8)))
    order = [
        middle,
        ranks[0],
        ranks[-1],
        *(r for r in ranks if r not in (middle, ranks[0], ranks[-1])),
    ]
    places = lora_placements(encoder)
    rows: list[tuple[str | None, int, float]] = []
    for rank, positions in itertools.chain(
        [(middle, _RATE_POSITIONS[:2])],
        [(ranks[0], _RATE_POSITIONS[:2])],
        [(middle, _RATE_POSITIONS[2:3])],
        ((rank, _RATE_POSITIONS) for rank in order),
    ):
        rows += [(place, rank, position) for position in positions for place in places]
    points = (single_method(encoder, "lora", *row) for row in dict.fromkeys(rows))
    return unique(point for point in points if point is not None)[:n_max]


def lora_choices(encoder: Encoder) -> tuple[Point, ...]:
    """Return all LoRA baselines: both placements, all ranks, nine rates."""
    if "lora" not in encoder.grid.methods:
        return ()
    ranks = sorted({option.rank for option in encoder.grid.options if option.method == "lora"})
    points = (
        single_method(encoder, "lora", place, rank, position / 10)
        for rank in ranks
        for place in lora_placements(encoder)
        for position in range(1, 10)
    )
    return unique(point for point in points if point is not None)


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
    """Return a portfolio: every method but LoRA, at its smallest size in all units.

    The LoRA baselines already cover medium and large sizes. On the synthetic landscapes of
    `examples/benchmarks/`, small sizes are a better start than medium sizes or a mixture.

    Args:
        encoder: Of the space.
        n_max: Maximum number of points.
    """
    grid = encoder.grid
    rows: list[Point | None] = []
    for name in (m for m in grid.methods if m != "lora"):
        places = [o.placement for o in grid.options if o.method == name]
        smallest = min(o.rank for o in grid.options if o.method == name)
        widest = max(places, key=lambda place: len(grid.placements[place]))
        wide = None if encoder.config.granularity == "site" else widest
        rows.append(single_method(encoder, name, wide, smallest, 0.5))
    half = max(1, len(grid.units) // 2)
    if "lora" in grid.methods:
        wide_lora = lora_placements(encoder)[-1]
        rows.append(single_method(encoder, "lora", wide_lora, 1, 0.6, last=half))
        rows.append(
            single_method(
                encoder, "lora", lora_placements(encoder)[0], 1, 0.6, last=max(1, half // 2)
            )
        )
    return unique(point for point in rows if point is not None)[:n_max]


def unique(points: Iterable[Point]) -> tuple[Point, ...]:
    """Drop duplicates, keep the order."""
    return tuple({point.key: point for point in points}.values())
