"""Plans and numbers in few words, the same in every table, page and plot."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from autopeft.plan import ROLES, AdapterPlan, LayerSpec

_EMPTY = "no adapter"


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


def human_count(value: float) -> str:
    """1234 -> "1.23k", 22_700_000 -> "22.7M"; three significant digits."""
    if not math.isfinite(value):
        return "-"
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def human_bytes(value: float) -> str:
    """Bytes with a binary unit: 1536 -> "1.5 KiB"."""
    if not math.isfinite(value):
        return "-"
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(value) >= 1024**power:
            return f"{value / 1024**power:.3g} {unit}"
    return f"{value:.0f} B"


def human_seconds(seconds: float) -> str:
    """75.2 -> "1m 15s"; below ten seconds one decimal."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def human_value(value: float, unit: str) -> str:
    """An objective's value for people, by its unit; a pure number gets three decimals."""
    if unit == "bytes":
        return human_bytes(value)
    if unit == "seconds":
        return human_seconds(value)
    if unit in ("parameters", "FLOPs"):
        return human_count(value)
    if not math.isfinite(value):
        return "-"
    if unit:
        return f"{value:.3g} {unit}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"
