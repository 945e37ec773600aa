"""A plan as one line of text: a summary for people, and an exact form that reads back.

The exact form is `lora:8@attn.q,attn.v[0-11]; ia3@mlp.down[3,5]`: LoRA of rank 8 at two roles of
blocks 0 to 11, and IA3 at one role of two blocks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from autopeft.errors import SpaceError
from autopeft.plan import MAX_LAYERS, ROLES, AdapterPlan, LayerSpec

_EMPTY = "no adapter"

_PART = re.compile(
    r"(?P<method>[\w-]+)(?:(?::| r)(?P<rank>[0-9]{1,9}))?"
    r"(?: @ (?P<words>[\w.,]+) in |@(?P<roles>[\w.,]+)\[)(?P<layers>[0-9,-]+)\]?"
)


def role_word(role: str) -> str:
    """Return a short word for a role: q for attn.q, up for mlp.up; cross.q, norm and block stay."""
    group, _, name = role.partition(".")
    return name if name and group in ("attn", "mlp") else role


_ROLE_OF = {role_word(role): role for role in ROLES}


def layer_ranges(layers: Iterable[int]) -> str:
    """Return layers as ranges: 0-2,5 for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def size_word(ranks: Iterable[int]) -> str:
    """Return the size after a method's name, such as r4 or r2-16; empty if it has none."""
    sizes = sorted(set(ranks))
    if sizes == [0]:
        return ""
    return f" r{sizes[0]}" if len(sizes) == 1 else f" r{sizes[0]}-{sizes[-1]}"


def plan_summary(plan: AdapterPlan, max_parts: int = 3) -> str:
    """Return a plan in one line, such as "lora r4 @ q,v in 3-5; ia3 @ k,v in 0-2".

    If that needs more than `max_parts`, return one part per method instead, with its range of sizes
    and its number of sites. `read_plan` reads exact summaries only.
    """
    if not plan.specs:
        return _EMPTY
    exact = [
        f"{method}{size_word([rank])} @ {_role_words(roles)} in {layer_ranges(layers)}"
        for (method, rank, roles), layers in _groups(plan).items()
    ]
    return "; ".join(exact if len(exact) <= max_parts else _coarse_parts(plan))


def block_lines(plan: AdapterPlan) -> list[tuple[str, str]]:
    """Return the plan by block, lowest first: the blocks that are alike, and their adapters.

    Example:
        >>> from autopeft.plan_text import block_lines, read_plan
        >>> block_lines(read_plan("lora:8@attn.q,attn.v[0-2]; ia3@mlp.down[2]"))
        [('0-1', 'lora r8 on q, v'), ('2', 'lora r8 on q, v; ia3 on down')]
    """
    adapters: defaultdict[int, list[str]] = defaultdict(list)
    for (method, rank, roles), layers in _groups(plan).items():
        names = ", ".join(map(role_word, sorted(roles, key=ROLES.index)))
        for layer in layers:
            adapters[layer].append(f"{method}{size_word([rank])} on {names}")
    alike: defaultdict[str, list[int]] = defaultdict(list)
    for layer in sorted(adapters):
        alike["; ".join(adapters[layer])].append(layer)
    return [(layer_ranges(layers), text) for text, layers in alike.items()]


def write_plan(plan: AdapterPlan) -> str:
    """Return the plan in its exact form; "none" for an empty one."""
    parts = [
        f"{method}{f':{rank}' if rank else ''}@{','.join(roles)}[{layer_ranges(layers)}]"
        for (method, rank, roles), layers in _groups(plan).items()
    ]
    return "; ".join(parts) or "none"


def read_plan(text: str) -> AdapterPlan:
    """Return the plan that `write_plan`, or `plan_summary` with enough parts, wrote.

    Raises:
        SpaceError: if a part cannot be read.
    """
    if text.strip() in ("none", _EMPTY):
        return AdapterPlan()
    specs = []
    for part in text.split(";"):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise SpaceError(
                "plan", part.strip(), "cannot be read", "write e.g. lora:8@attn.q[0-3]"
            )
        names = (match["words"] or match["roles"]).split(",")
        roles = [_ROLE_OF.get(name, name) for name in names] if match["words"] else names
        specs += [
            LayerSpec(layer, role, match["method"], int(match["rank"] or 0))
            for layer in _layers(match["layers"])
            for role in roles
        ]
    return AdapterPlan(specs)


def unsearched_text(shares: Mapping[str, float], *, max_parts: int = 6) -> str:
    """Return which weights of the blocks get no adapter, and their share; "" if it is nothing.

    Args:
        shares: Path inside a block or role -> share of the blocks' parameters, largest first.
        max_parts: Most modules to name.

    Example:
        >>> from autopeft.plan_text import unsearched_text
        >>> unsearched_text({"mlp.experts": 0.75, "mlp.gate": 0.01})
        "76% of the blocks' parameters get no adapter: mlp.experts (75%), mlp.gate (1%)"
    """
    total = sum(shares.values())
    if total < _SMALL_SHARE:
        return ""
    parts = [f"{path} ({_percent(share)})" for path, share in shares.items()]
    more = [f"{len(parts) - max_parts} more"] if len(parts) > max_parts else []
    named = ", ".join([*parts[:max_parts], *more])
    text = f"{_percent(total)} of the blocks' parameters get no adapter: {named}"
    experts = ", ".join(path for path in shares if path in ROLES and path.startswith("experts."))
    if not experts:
        return text
    return f"{text}; a space with experts: [{experts}] among its placements gives them a LoRA"


_SMALL_SHARE = 0.001
"""Less is not worth a note: gates, and biases of relative positions."""


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else f"{share:.1%}"


def _groups(plan: AdapterPlan) -> dict[tuple[str, int, tuple[str, ...]], list[int]]:
    """Layers by (method, rank, roles), in the order of their first layer."""
    by_layer: defaultdict[tuple[str, int, int], list[str]] = defaultdict(list)
    for spec in plan.specs:
        by_layer[spec.method, spec.rank, spec.layer].append(spec.role)
    groups: defaultdict[tuple[str, int, tuple[str, ...]], list[int]] = defaultdict(list)
    for (method, rank, layer), roles in by_layer.items():
        groups[method, rank, tuple(roles)].append(layer)
    return groups


def _coarse_parts(plan: AdapterPlan) -> list[str]:
    """One part per method: its range of sizes, roles and layers, and its number of sites."""
    by_method: defaultdict[str, list[LayerSpec]] = defaultdict(list)
    for spec in plan.specs:
        by_method[spec.method].append(spec)
    parts = []
    for method, specs in by_method.items():
        layers, roles = {spec.layer for spec in specs}, {spec.role for spec in specs}
        sites = "" if len(specs) == len(layers) * len(roles) else f" ({len(specs)} sites)"
        size = size_word(spec.rank for spec in specs)
        parts.append(f"{method}{size} @ {_role_words(roles)} in {layer_ranges(layers)}{sites}")
    return parts


def _role_words(roles: Iterable[str]) -> str:
    return ",".join(role_word(role) for role in sorted(roles, key=ROLES.index))


def _layers(text: str) -> list[int]:
    """The layers in a text such as "0-2,5"."""
    result: list[int] = []
    for piece in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", piece)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        # Checked before a range is written out: another's text may name a billion blocks.
        if not first <= last < MAX_LAYERS:
            problem = f"must be a block or a range of blocks below {MAX_LAYERS}"
            raise SpaceError("layers", piece, problem, "write e.g. 0-3,5")
        result += range(first, last + 1)
    return result
