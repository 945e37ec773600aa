"""Plans in one short line: readable in a dashboard, small in a database, exact both ways.

`lora:8@attn.q,attn.v[0-11]; ia3@mlp.down[3,5]` is LoRA of rank 8 at two roles of blocks 0 to 11 and
IA3 at one role of two blocks.
"""

from __future__ import annotations

import re

from autopeft.errors import SpaceError
from autopeft.plan import AdapterPlan, LayerSpec

_PART = re.compile(
    r"^(?P<method>[\w-]+)(?::(?P<rank>\d+))?@(?P<roles>[\w.,]+)\[(?P<layers>[\d,-]+)\]$"
)


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
