"""A price table from shapes alone: no model, no torch, a transformer of the usual build assumed.

Blocks are taken as: norm, attention, residual, norm, feed-forward, residual, in sequence. Good for
driving a search with an outside evaluator; `autopeft.profiling.measure` measures the real thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autopeft.costs.shapes import Shape, Topology
from autopeft.costs.table import (
    ENCODER,
    HIDDEN,
    BlockPrice,
    PriceTable,
    Sources,
    Usage,
    independent_sets,
)
from autopeft.plan import MODEL

_STAGE: Mapping[str, int] = {
    HIDDEN: 0,
    "norm": 1,
    "attn.q": 2,
    "attn.k": 2,
    "attn.v": 2,
    "attn.qkv": 2,
    "attn": 3,
    "attn.o": 4,
    "cross.q": 5,
    "cross.k": 5,
    "cross.v": 5,
    "cross.o": 6,
    "mlp.up": 7,
    "mlp.gate": 7,
    "mlp.gate_up": 7,
    "mlp.down": 8,
    "block": 9,
}
"""The order in which a block computes its roles."""

_NOT_LINEAR = ("norm", "attn", "block")
"""Roles that are no linear module."""

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
        out * in_
        for role, (out, in_) in shapes.items()
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
    widths = {role: in_ for role, (_, in_) in shapes.items() if role != "norm"}
    return Usage(
        backward_flops=flops,
        saved_bytes=floats * memory_tokens * float_bytes,
        live_inputs=live_inputs,
        input_bytes={role: in_ * memory_tokens * float_bytes for role, in_ in widths.items()},
    )


def table_from_shapes(
    topology: Topology,
    *,
    tokens_per_step: float,
    batch_size: int,
    longest_tokens_per_step: float | None,
    base_params: int | None,
    float_bytes: int,
    prompt_sizes: Sequence[int] = (),
) -> PriceTable:
    """The table of a transformer of the usual build.

    Args:
        topology: Its shapes.
        tokens_per_step: Tokens in a mean step, padding included.
        batch_size: Rows in a step.
        longest_tokens_per_step: Tokens in the step that needs most memory; default: the mean's.
        base_params: Parameters of the whole model; default: those of the linear modules.
        float_bytes: Bytes of a weight and of an activation.
        prompt_sizes: Virtual tokens of the prompts that can be priced.
    """
    longest = longest_tokens_per_step or tokens_per_step
    longer = {
        size: table_from_shapes(
            topology,
            tokens_per_step=tokens_per_step + size * batch_size,
            batch_size=batch_size,
            longest_tokens_per_step=longest + size * batch_size,
            base_params=base_params,
            float_bytes=float_bytes,
        )
        for size in prompt_sizes
    }
    memory_tokens = longest
    kinds: list[int] = []
    blocks: list[BlockPrice] = []
    seen: dict[tuple[tuple[str, Shape], ...], int] = {}
    n_linear, forward = 0, 0.0
    for layer in range(topology.n_layers):
        shapes: dict[str, Shape] = {}
        for role in topology.roles(layer):
            if role == MODEL:
                continue
            shape = topology.shape(layer, role)
            if shape is not None:
                shapes[role] = shape
        linear = sum(o * i for role, (o, i) in shapes.items() if role not in _NOT_LINEAR)
        attention = sum(shapes[role][1] for role in ("attn.o", "cross.o") if role in shapes)
        n_linear += linear
        block_forward = tokens_per_step * (
            2.0 * linear + 4.0 * attention * tokens_per_step / batch_size
        )
        forward += block_forward
        key = tuple(sorted(shapes.items()))
        if key not in seen:
            seen[key] = len(blocks)
            reach = _reach(tuple(shapes))
            blocks.append(
                BlockPrice(
                    usages={
                        sources: _usage(
                            sources,
                            reach,
                            shapes,
                            tokens_per_step,
                            memory_tokens,
                            batch_size,
                            float_bytes,
                        )
                        for sources in independent_sets(reach)
                    },
                    reach=reach,
                    input_of={
                        role: ENCODER if role in _SIDEWAYS else f"in{_STAGE[role]}"
                        for role in shapes
                    },
                    forward_flops=block_forward,
                )
            )
        kinds.append(seen[key])
    head_flops = 2.0 * topology.head_params * batch_size
    n_params = base_params if base_params is not None else n_linear + topology.head_params
    return PriceTable(
        topology=topology,
        batch_size=batch_size,
        tokens=tokens_per_step,
        memory_tokens=memory_tokens,
        base_params=n_params,
        weight_bytes=n_params * float_bytes,
        forward_flops=forward + head_flops,
        blocks=tuple(blocks),
        kinds=tuple(kinds),
        tail=Usage(backward_flops=2.0 * head_flops),
        head_only=Usage(backward_flops=head_flops),
        longer=longer,
        float_bytes=float_bytes,
    )
