"""What the frozen parts of a model cost in one step, block by block.

What a block's backward pass costs depends on where in the block gradients start, its *sources*: the
adapted roles, and the block's inputs once something below is adapted. A source downstream of
another one changes nothing, so few sets of sources differ; there is one `Usage` for each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

HIDDEN = "@hidden"
"""The source that means that the block's own input needs a gradient."""

ENCODER = "@encoder"
"""The source that means that the encoder's output needs a gradient, in a decoder's block."""

NARROW_ROLES = ("attn.q", "attn.o", "mlp.up", "mlp.gate", "mlp.gate_up", "mlp.down")
"""Roles computed for each position alone. The last block skips them at positions that are not
read."""

Sources = frozenset[str]


@dataclass(frozen=True)
class Usage:
    """What the frozen part of a block (or of the model around the blocks) costs in one step.

    Attributes:
        backward_flops: FLOPs of its backward pass.
        saved_bytes: What its forward pass keeps for the backward pass.
        live_inputs: Roles whose input needs a gradient.
        input_bytes: Role -> extra bytes to keep that role's input (0 if it is kept anyway). At
            "norm": what training the normalizations keeps in addition.
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
    """The costs of one kind of block; equal blocks share them.

    Attributes:
        usages: Set of independent sources -> usage.
        reach: Source -> the sources downstream of it.
        input_of: Role -> a name of the tensor it reads, equal for roles that read the same one;
            `ENCODER` for the encoder's output, which all decoder blocks read.
        repeats: How often one forward pass runs the block (ALBERT runs one many times).
        tokens: Role -> tokens it sees in a step of mean length; default `PriceTable.tokens`.
        memory_tokens: Role -> tokens it sees in a step of the longest rows.
        forward_flops: FLOPs of its frozen forward pass in one step.
        hidden_bytes: Bytes of the hidden states that enter it.
        scratch_bytes: The most that its passes hold at once, beyond what is kept.
        scoring_bytes: The most that its forward pass holds at once without gradients.
    """

    usages: Mapping[Sources, Usage]
    reach: Mapping[str, frozenset[str]]
    input_of: Mapping[str, str]
    repeats: int = 1
    tokens: Mapping[str, float] = field(default_factory=dict)
    memory_tokens: Mapping[str, float] = field(default_factory=dict)
    forward_flops: float = 0.0
    hidden_bytes: float = 0.0
    scratch_bytes: float = 0.0
    scoring_bytes: float = 0.0

    def usage(self, sources: Sources) -> Usage:
        """Return the usage when gradients start at those sources."""
        found = self.usages.get(sources)
        return self.usages[independent(sources, self.reach)] if found is None else found


@dataclass(frozen=True)
class Logits:
    """An output embedding, and what surrounds it in a step of the longest rows.

    Attributes:
        vocabulary: Logits of a position.
        saved_bytes: What is kept between the blocks and the embedding.
    """

    vocabulary: int
    saved_bytes: float

    KEPT_BYTES: ClassVar[int] = 4
    """Kept for each logit of a cross-entropy: its logarithm's softmax, in fp32."""

    SCRATCH_BYTES: ClassVar[int] = 8
    """Held beside it at once: the logit and its like in the forward pass, two gradients after."""


def independent(sources: Iterable[str], reach: Mapping[str, frozenset[str]]) -> Sources:
    """Return the sources that are not downstream of another one."""
    all_ = frozenset(sources)
    return frozenset(s for s in all_ if not any(s in reach[other] and other != s for other in all_))


def independent_sets(reach: Mapping[str, frozenset[str]]) -> Iterator[Sources]:
    """Yield every set of independent sources, the empty one included."""
    names = sorted(reach)

    def extend(chosen: tuple[str, ...], start: int) -> Iterator[Sources]:
        yield frozenset(chosen)
        for i in range(start, len(names)):
            new = names[i]
            if all(new not in reach[old] and old not in reach[new] for old in chosen):
                yield from extend((*chosen, new), i + 1)

    return extend((), 0)
