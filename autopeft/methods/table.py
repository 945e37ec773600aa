"""The table of methods, for the terminal and for the guide to search spaces."""

from __future__ import annotations

from autopeft.methods import all_methods
from autopeft.methods.base import Method

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
    return [_row(method) for method in all_methods()]


def _row(method: Method) -> tuple[str, ...]:
    low, high = method.learning_rate
    return (
        method.name,
        where(method),
        " ".join(map(str, method.default_ranks)) or "-",
        f"{_rate(low)} to {_rate(high)}",
        _word(method.mergeable),
        _word(method.converts_to_lora),
        _word(method.quantized_base),
        _word(method.shared_state),
    )


def _rate(value: float) -> str:
    """Format with two digits, such as 1.5e-3."""
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+00", "")


def where(method: Method) -> str:
    """Return the roles of a method; "linear" stands for all linear modules."""
    roles = set(method.roles)
    parts = []
    for word, members in _GROUPS.items():
        if members <= roles:
            parts.append(word)
            roles -= members
    return ", ".join([*parts, *(role for role in method.roles if role in roles)])


_LINEAR = frozenset(
    {
        *(f"{kind}.{part}" for kind in ("attn", "cross") for part in ("q", "k", "v", "o")),
        *("attn.qkv", "mlp.up", "mlp.gate", "mlp.gate_up", "mlp.down"),
    }
)
_GROUPS = {"linear": _LINEAR}


def _word(flag: bool) -> str:
    return "yes" if flag else "no"


def markdown() -> str:
    """Return the table as Markdown, without a final line break."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    lines += ["| " + " | ".join((f"`{row[0]}`", *row[1:])) + " |" for row in rows()]
    return "\n".join(lines)
