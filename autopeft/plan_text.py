"""A plan as one line of text: a summary to read, and an exact form that reads back.

The exact form is `lora:8@attn.q,attn.v[0-11]; ia3@mlp.down[3,5]`: LoRA of rank 8 at two roles of
blocks 0 to 11, and IA3 at one role of two blocks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from autopeft.errors import SpaceError
from autopeft.plan import ROLES, AdapterPlan, LayerSpec

_EMPTY = "no adapter"

_PART = re.compile(
    r"^(?P<method>[\w-]+)(?::(?P<rank>\d+))?@(?P<roles>[\w.,]+)\[(?P<layers>[\d,-]+)\]$"
)


def role_word(role: str) -> str:
    """A short word for a role: q for attn.q, up for mlp.up; cross.q, norm and block stay."""
    room, _, name = role.partition(".")
    return name if room in ("attn", "mlp") else role


def layer_ranges(layers: Iterable[int]) -> str:
    """Layers in few characters: 0-2,5 for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def size_word(ranks: Iterable[int]) -> str:
    """The size after a method's name, such as r4 or r2-16; nothing where a method has none."""
    sizes = sorted(set(ranks))
    if sizes == [0]:
        return ""
    return f" r{sizes[0]}" if len(sizes) == 1 else f" r{sizes[0]}-{sizes[-1]}"


def _roles(specs: Iterable[LayerSpec]) -> str:
    roles = sorted({spec.role for spec in specs}, key=ROLES.index)
    return ",".join(role_word(role) for role in roles)


def _exact_parts(plan: AdapterPlan) -> list[str]:
    """One part for each (method, size, roles), naming its layers: nothing is left out."""
    per_layer: defaultdict[tuple[str, int, int], list[LayerSpec]] = defaultdict(list)
    for spec in plan.specs:
        per_layer[spec.method, spec.rank, spec.layer].append(spec)
    layers: defaultdict[tuple[str, int, str], list[int]] = defaultdict(list)
    for (method, rank, layer), specs in per_layer.items():
        layers[method, rank, _roles(specs)].append(layer)
    return [
        f"{method}{size_word([rank])} @ {roles} in {layer_ranges(where)}"
        for (method, rank, roles), where in sorted(layers.items(), key=lambda item: min(item[1]))
    ]


def _coarse_parts(plan: AdapterPlan) -> list[str]:
    """One part a method: range of sizes, roles and layers, and how many sites of them it takes."""
    by_method: defaultdict[str, list[LayerSpec]] = defaultdict(list)
    for spec in plan.specs:
        by_method[spec.method].append(spec)
    parts = []
    for method, specs in by_method.items():
        layers = {spec.layer for spec in specs}
        is_full = len(specs) == len(layers) * len({spec.role for spec in specs})
        sites = "" if is_full else f" ({len(specs)} sites)"
        size = size_word(spec.rank for spec in specs)
        parts.append(f"{method}{size} @ {_roles(specs)} in {layer_ranges(layers)}{sites}")
    return parts


def plan_summary(plan: AdapterPlan, max_parts: int = 3) -> str:
    """A plan in one line, such as "lora r4 @ q,v in 3-5; ia3 @ k,v in 0-2".

    Args:
        plan: The architecture.
        max_parts: Where the exact description needs more parts than this, one part a method is
            given instead, with its range of sizes and its number of sites.
    """
    if not plan.specs:
        return _EMPTY
    exact = _exact_parts(plan)
    return "; ".join(exact if len(exact) <= max_parts else _coarse_parts(plan))


def write_plan(plan: AdapterPlan) -> str:
    """The plan in one line; "none" for an empty one."""
    by_layer: dict[tuple[str, int, int], list[str]] = {}
    for spec in plan.specs:
        by_layer.setdefault((spec.method, spec.rank, spec.layer), []).append(spec.role)
    groups: dict[tuple[str, int, tuple[str, ...]], list[int]] = {}
    for (method, rank, layer), roles in by_layer.items():
        groups.setdefault((method, rank, tuple(roles)), []).append(layer)
    return "; ".join(
        f"{method}{f':{rank}' if rank else ''}@{','.join(roles)}[{_ranges(layers)}]"
        for (method, rank, roles), layers in groups.items()
    ) or "none"  # fmt: skip


def read_plan(text: str) -> AdapterPlan:
    """The plan that `write_plan` wrote.

    Raises:
        SpaceError: if a part cannot be read.
    """
    if text.strip() == "none":
        return AdapterPlan()
    specs = []
    for part in text.split(";"):
        match = _PART.match(part.strip())
        if match is None:
            raise SpaceError(
                "plan", part.strip(), "cannot be read", "write e.g. lora:8@attn.q[0-3]"
            )
        rank = int(match["rank"] or 0)
        specs += [
            LayerSpec(layer, role, match["method"], rank)
            for layer in _numbers(match["layers"])
            for role in match["roles"].split(",")
        ]
    return AdapterPlan(specs)


def _ranges(numbers: list[int]) -> str:
    """Numbers as e.g. "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _numbers(text: str) -> list[int]:
    """The numbers in e.g. "0-2,5"."""
    result: list[int] = []
    for piece in text.split(","):
        first, _, last = piece.partition("-")
        result += range(int(first), int(last or first) + 1)
    return result
