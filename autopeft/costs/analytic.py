"""Block costs from shapes alone, for a transformer of the usual build: no model, no torch.

A block is assumed to be norm, attention, residual, norm, feed-forward, residual, in sequence, and a
token to go to one expert. Good enough for a search without a model at hand;
`autopeft.profiling.measure` measures a real one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from autopeft.costs.topology import Shape, Topology
from autopeft.costs.usage import ENCODER, HIDDEN, BlockCosts, Sources, Usage, independent_sets
from autopeft.plan import MODEL

_STAGE: Mapping[str, int] = {
    HIDDEN: 0,
    "norm": 1,
    "attn.q": 2,
    "attn.k": 2,
    "attn.v": 2,
    "attn.qkv": 2,
    "attn.q_a": 2,
    "attn.kv_a": 2,
    "attn.q_b": 3,
    "attn.kv_b": 3,
    "attn": 4,
    "attn.o": 5,
    "cross.q": 6,
    "cross.k": 6,
    "cross.v": 6,
    "cross.o": 7,
    "mlp.up": 8,
    "mlp.gate": 8,
    "mlp.gate_up": 8,
    "mlp.down": 9,
    "experts.gate_up": 8,
    "experts.up": 8,
    "experts.down": 9,
    "block": 10,
}
"""Role -> its position in the order in which a block computes them."""

_NOT_LINEAR = ("norm", "attn", "block")
"""Roles that are not one linear module."""

_SIDEWAYS = ("cross.k", "cross.v")
"""Roles that read the encoder's output."""


def _reach(roles: tuple[str, ...]) -> dict[str, frozenset[str]]:
    def below(source: str) -> frozenset[str]:
        if source == ENCODER:
            return frozenset(r for r in roles if r in _SIDEWAYS or _STAGE[r] > _STAGE["cross.k"])
        return frozenset(r for r in roles if _STAGE[r] > _STAGE[source] and r not in _SIDEWAYS)

    sources = (*roles, HIDDEN, *((ENCODER,) if "cross.k" in roles else ()))
    return {source: below(source) for source in sources}


def _usage(
    sources: Sources,
    reach: Mapping[str, frozenset[str]],
    shapes: Mapping[str, Shape],
    tokens: float,
    memory_tokens: float,
    rows: int,
    float_bytes: int,
) -> Usage:
    live_inputs = frozenset().union(*(reach[source] for source in sources)) - {"norm"}
    live_outputs = live_inputs | sources
    linear = sum(
        shape[0] * shape[1]
        for role, shape in shapes.items()
        if role in live_inputs and role not in _NOT_LINEAR
    )
    flops = 2.0 * linear * tokens
    floats = 0.0
    for block in ("attn", "cross"):
        parts = [r for r in shapes if r.startswith(f"{block}.") and r != f"{block}.o"]
        if any(r in live_outputs for r in parts):
            width = shapes.get(f"{block}.o", (0, 0))[1]
            flops += 8.0 * tokens * (tokens / rows) * width
            floats += sum(shapes[r][0] for r in parts) + width
    if any(r in live_outputs for r in ("mlp.up", "mlp.gate", "mlp.gate_up")):
        floats += sum(shapes[r][0] for r in ("mlp.up", "mlp.gate", "mlp.gate_up") if r in shapes)
        if "mlp.up" not in shapes or "mlp.gate" in shapes:
            floats += shapes["mlp.down"][1] if "mlp.down" in shapes else 0
    if HIDDEN in sources and "norm" in shapes:
        floats += shapes["norm"][0] * shapes["norm"][1]
    widths = {role: shape[1] for role, shape in shapes.items() if role != "norm"}
    return Usage(
        backward_flops=flops,
        saved_bytes=floats * memory_tokens * float_bytes,
        live_inputs=live_inputs,
        input_bytes={role: in_ * memory_tokens * float_bytes for role, in_ in widths.items()},
    )


def block_costs(
    topology: Topology, *, tokens: float, memory_tokens: float, rows: int, float_bytes: int
) -> tuple[tuple[BlockCosts, ...], tuple[int, ...]]:
    """Return the kinds of block of a transformer of the usual build, and the kind of each layer.

    The arguments are those of `PriceTable`; `rows` is its batch size.
    """
    kinds: list[int] = []
    blocks: list[BlockCosts] = []
    known: dict[tuple[tuple[str, Shape], ...], int] = {}
    for layer in range(topology.n_layers):
        shapes = block_shapes(topology, layer)
        key = tuple(sorted(shapes.items()))
        if key not in known:
            known[key] = len(blocks)
            reach = _reach(tuple(shapes))
            attention = sum(shapes[role][1] for role in ("attn.o", "cross.o") if role in shapes)
            usages = {
                sources: _usage(sources, reach, shapes, tokens, memory_tokens, rows, float_bytes)
                for sources in independent_sets(reach)
            }
            blocks.append(
                BlockCosts(
                    usages=usages,
                    reach=reach,
                    input_of={
                        role: ENCODER if role in _SIDEWAYS else _input_of(role) for role in shapes
                    },
                    forward_flops=tokens
                    * (2.0 * _weights_of_a_token(shapes) + 4.0 * attention * tokens / rows),
                )
            )
        kinds.append(known[key])
    return tuple(blocks), tuple(kinds)


def _input_of(role: str) -> str:
    """Return a name of the tensor that a role reads: latent vectors of queries are their own."""
    return f"in{_STAGE[role]}{role if role.endswith('_b') else ''}"


def block_shapes(topology: Topology, layer: int) -> dict[str, Shape]:
    """Return role -> shape of one block; the model as a whole is not one of its roles."""
    return {
        role: shape
        for role in topology.roles(layer)
        if role != MODEL and (shape := topology.shape(layer, role)) is not None
    }


def linear_weights(shapes: Mapping[str, Shape]) -> int:
    """Return the number of weights of a block's linear modules and experts."""
    return sum(math.prod(shape) for role, shape in shapes.items() if role not in _NOT_LINEAR)


def _weights_of_a_token(shapes: Mapping[str, Shape]) -> int:
    """Return how many of them a token is multiplied with: one expert's."""
    return linear_weights({role: shape[:2] for role, shape in shapes.items()})
