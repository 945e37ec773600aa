"""The objectives of a search: one quality, then the costs to trade against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from autopeft.errors import SettingsError

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Objective:
    """One thing to optimize.

    Attributes:
        name: As written in `front.json`.
        direction: "maximize" or "minimize".
        unit: For people; empty for a pure number.
        is_known: True if the value is known before training, from the price.

    Example:
        >>> autopeft.Objective("perplexity", "minimize").sign()
        -1.0
    """

    name: str
    direction: Direction
    unit: str = ""
    is_known: bool = False

    def sign(self) -> float:
        """+1 where larger is better, -1 where smaller is."""
        return 1.0 if self.direction == "maximize" else -1.0


COSTS: Mapping[str, Objective] = {
    o.name: o
    for o in (
        Objective("trainable_params", "minimize", "parameters", is_known=True),
        Objective("adapter_bytes", "minimize", "bytes", is_known=True),
        Objective("train_flops", "minimize", "FLOPs", is_known=True),
        Objective("peak_memory_bytes", "minimize", "bytes", is_known=True),
        Objective("train_seconds", "minimize", "seconds"),
        Objective("latency_ms", "minimize", "ms"),
    )
}
"""Every efficiency objective."""

COST_PROXIES: Mapping[str, str] = {"train_seconds": "train_flops", "latency_ms": "inference_flops"}
"""Cost that is only measured -> known cost that is roughly proportional to it."""

_MINIMISED_QUALITIES = frozenset({"loss", "perplexity"})


def objective(name: str) -> Objective:
    """The objective of that name: a cost from `COSTS`, else a quality metric.

    A quality is maximized, except "loss" and "perplexity".

    Raises:
        SettingsError: if the name is empty.
    """
    if not name:
        raise SettingsError("objectives", name, "an objective needs a name", "use e.g. accuracy")
    if name in COSTS:
        return COSTS[name]
    return Objective(name, "minimize" if name in _MINIMISED_QUALITIES else "maximize")
