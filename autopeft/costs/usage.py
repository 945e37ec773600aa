"""What the frozen parts of a model cost in one step, block by block.

What a block's backward pass costs depends on where in the block gradients start, its *sources*: the
adapted roles, and the block's inputs once something below is adapted. A source downstream of
another one changes nothing, so few sets of sources differ; there is one `Usage` for each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

HIDDEN = "@hidden"
"""The source that stands for the block's own input needing a gradient."""

ENCODER = "@encoder"
"""The source that stands for the encoder's output needing a gradient, in a decoder's block."""

NARROW_ROLES = ("attn.q", "attn.o", "mlp.up", "mlp.gate", "mlp.gate_up", "mlp.down")
"""What a block computes for one position without looking at others: in the last block, only where
its output is read."""

Sources = frozenset[str]


@dataclass(frozen=True)
class Usage:
    """What the frozen part of a block (or of the model around the blocks) costs in one step.

    Attributes:
        backward_flops: FLOPs of its backward pass.
        saved_bytes: What its forward pass keeps for the backward pass.
        live_inputs: Roles whose input needs a gradient.
        input_bytes: Role -> bytes it takes to keep that role's input too (0 where it is kept
            anyway). At "norm": what training the normalizations keeps in addition.
        context: Number of a tensor that blocks share (a mask, a rotary table) -> its bytes, for
            those it keeps. Blocks of one table number alike, so that each is counted once.
    """

    backward_flops: float = 0.0
    saved_bytes: float = 0.0
    live_inputs: frozenset[str] = frozenset()
    input_bytes: Mapping[str, float] = field(default_factory=dict)
    context: Mapping[int, float] = field(default_factory=dict)


NO_USAGE = Usage()


@dataclass(frozen=True)
class BlockCosts:
    """All about one kind of block; blocks that differ in nothing share it.

    Attributes:
        usages: Set of independent sources -> usage.
        reach: Source -> the sources downstream of it.
        input_of: Role -> a name for the tensor it reads; roles that read one tensor share it. What
            is named `ENCODER` is shared by all blocks.
        repeats: How often a step runs the block (ALBERT runs one block many times).
        tokens: Role -> tokens it sees in a step of mean length; else `PriceTable.tokens`.
        memory_tokens: Role -> tokens it sees in a step of the longest rows.
        forward_flops: FLOPs of its frozen forward pass in one step.
    """

    usages: Mapping[Sources, Usage]
    reach: Mapping[str, frozenset[str]]
    input_of: Mapping[str, str]
    repeats: int = 1
    tokens: Mapping[str, float] = field(default_factory=dict)
    memory_tokens: Mapping[str, float] = field(default_factory=dict)
    forward_flops: float = 0.0

    def usage(self, sources: Sources) -> Usage:
        """The usage when gradients start at those sources."""
        found = self.usages.get(sources)
        return self.usages[independent(sources, self.reach)] if found is None else found


def independent(sources: Iterable[str], reach: Mapping[str, frozenset[str]]) -> Sources:
    """The sources that lie downstream of no other."""
    all_ = frozenset(sources)
    return frozenset(s for s in all_ if not any(s in reach[other] and other != s for other in all_))


def independent_sets(reach: Mapping[str, frozenset[str]]) -> Iterator[Sources]:
    """Every set of sources none of which lies downstream of another, the empty one included."""
    names = sorted(reach)

    def extend(chosen: tuple[str, ...], start: int) -> Iterator[Sources]:
        yield frozenset(chosen)
        for i in range(start, len(names)):
            new = names[i]
            if all(new not in reach[old] and old not in reach[new] for old in chosen):
                yield from extend((*chosen, new), i + 1)

    return extend((), 0)
