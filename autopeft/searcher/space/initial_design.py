"""Known recipes of a space: the tuned-LoRA grid, the reference, a portfolio of strong starts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from autopeft.searcher.space.encoding import Codec, Genome, snap

_RATE_POSITIONS = (0.5, 0.75, 0.25, 0.9, 0.1)
"""Middle of the range first: the ranges were chosen around what usually works."""


def reference(codec: Codec) -> Genome:
    """No adapter at all: what training without adapters (or the base itself) achieves."""
    return Genome(np.zeros(len(codec.grid.units), dtype=np.int64))


def everywhere(
    codec: Codec,
    method: str,
    placement: str | None,
    rank: int,
    position: float,
    last: int | None = None,
) -> Genome | None:
    """One method in all units (or the last ones), at the legal rank nearest to the wanted one.

    Returns:
        None where the method fits no unit.
    """
    grid = codec.grid
    options = np.zeros(len(grid.units), dtype=np.int64)
    names = [
        o
        for o, option in enumerate(grid.options)
        if option.method == method and placement in (None, option.placement)
    ]
    first = 0 if last is None else len(options) - last
    for unit in range(max(first, 0), len(options)):
        fitting = [o for o in names if grid.legal[unit, o]]
        if fitting:
            options[unit] = min(
                fitting, key=lambda o: abs(np.log(max(grid.options[o].rank, 1) / max(rank, 1)))
            )
    return Genome(options, snap(position)) if options.any() else None


def baselines(codec: Codec, n_max: int | None = None) -> tuple[Genome, ...]:
    """The tuned-LoRA grid: two placements x ranks x learning rates, most telling first.

    The first four already cover both placements at two rates; ranks widen after that. Empty where
    the space has no LoRA.

    Args:
        codec: Gives grid and rates.
        n_max: Cut the list here; None for the whole grid.
    """
    grid = codec.grid
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
    places = lora_placements(codec)
    rows: list[tuple[str | None, int, float]] = []
    for rank, positions in itertools.chain(
        [(middle, _RATE_POSITIONS[:2])],
        [(ranks[0], _RATE_POSITIONS[:2])],
        [(middle, _RATE_POSITIONS[2:3])],
        ((rank, _RATE_POSITIONS) for rank in order),
    ):
        rows += [(place, rank, position) for position in positions for place in places]
    genomes = (everywhere(codec, "lora", *row) for row in dict.fromkeys(rows))
    return unique(genome for genome in genomes if genome is not None)[:n_max]


def lora_choices(codec: Codec) -> tuple[Genome, ...]:
    """Every LoRA a fair baseline may be: both placements, all ranks, nine rates."""
    if "lora" not in codec.grid.methods:
        return ()
    ranks = sorted({option.rank for option in codec.grid.options if option.method == "lora"})
    genomes = (
        everywhere(codec, "lora", place, rank, position / 10)
        for rank in ranks
        for place in lora_placements(codec)
        for position in range(1, 10)
    )
    return unique(genome for genome in genomes if genome is not None)


def lora_placements(codec: Codec) -> Sequence[str | None]:
    """The narrow and the wide placement LoRA is usually given: q,v and all linear modules."""
    if codec.source.granularity == "site":
        return (None,)
    grid = codec.grid
    places = dict.fromkeys(o.placement for o in grid.options if o.method == "lora")
    sizes = {place: len(grid.placements[place]) for place in places}
    narrow = min(sizes, key=lambda place: (place != "qv", sizes[place]))
    wide = max(sizes, key=lambda place: sizes[place])
    return tuple(dict.fromkeys((narrow, wide)))


def portfolio(codec: Codec, n_max: int | None = None) -> tuple[Genome, ...]:
    """Strong starts besides LoRA's: each method alone at its smallest size, everywhere it may sit.

    The LoRA baselines already cover middle and large sizes. Small plans everywhere tell most about
    a method for what they cost, and most of the cost axis lies above them: on the made-up
    landscapes of `examples/benchmarks/` they serve better than middle sizes or a mixture.

    Args:
        codec: Gives grid and rates.
        n_max: Cut the list here.
    """
    grid = codec.grid
    rows: list[Genome | None] = []
    for name in (m for m in grid.methods if m != "lora"):
        places = [o.placement for o in grid.options if o.method == name]
        smallest = min(o.rank for o in grid.options if o.method == name)
        widest = max(places, key=lambda place: len(grid.placements[place]))
        wide = None if codec.source.granularity == "site" else widest
        rows.append(everywhere(codec, name, wide, smallest, 0.5))
    half = max(1, len(grid.units) // 2)
    if "lora" in grid.methods:
        wide_lora = lora_placements(codec)[-1]
        rows.append(everywhere(codec, "lora", wide_lora, 1, 0.6, last=half))
        rows.append(
            everywhere(codec, "lora", lora_placements(codec)[0], 1, 0.6, last=max(1, half // 2))
        )
    return unique(genome for genome in rows if genome is not None)[:n_max]


def unique(genomes: Iterable[Genome]) -> tuple[Genome, ...]:
    """Each genome once, in order."""
    return tuple({genome.key: genome for genome in genomes}.values())
