"""The table of methods, for the terminal and for the guide to search spaces."""

from __future__ import annotations

from autopeft.methods import all_methods
from autopeft.methods.base import EXPERT_ROLES, LINEAR_ROLES, Method

HEADER = (
    "method",
    "where",
    "sizes",
    "learning rate",
    "merge",
    "to LoRA",
    "quantized base",
    "shares state",
)
"""Column names."""


def rows() -> list[tuple[str, ...]]:
    """Return one row of cells for each method."""
    return [
        (
            method.name,
            where(method),
            " ".join(map(str, method.default_ranks)) or "-",
            " to ".join(map(_rate, method.learning_rate)),
            *("yes" if flag else "no" for flag in _flags(method)),
        )
        for method in all_methods()
    ]


def _flags(method: Method) -> tuple[bool, ...]:
    return method.mergeable, method.converts_to_lora, method.quantized_base, method.shared_state


def _rate(value: float) -> str:
    """Format with two digits, such as 1.5e-3."""
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+00", "")


def where(method: Method) -> str:
    """Return the roles of a method; "linear" and "experts" stand for all roles of that kind."""
    roles = list(method.roles)
    for word, kind in (("experts", EXPERT_ROLES), ("linear", LINEAR_ROLES)):
        if set(kind) <= set(roles):
            roles = [word, *(role for role in roles if role not in kind)]
    return ", ".join(roles)


def markdown() -> str:
    """Return the table as Markdown, without a final line break."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    lines += ["| " + " | ".join((f"`{row[0]}`", *row[1:])) + " |" for row in rows()]
    return "\n".join(lines)
