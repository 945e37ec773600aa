"""The few parameters of a trial that people plot.

A search keeps a candidate in attributes of its Optuna trial, and samplers work on points. So the
trial's parameters are free to be what reads well in optuna-dashboard: one learning rate and one
method instead of a method, a rank and a placement for every block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from autopeft import methods
from autopeft.plan import MODEL, AdapterPlan, Candidate
from autopeft.searcher.space.encoding import round_rate
from autopeft.searcher.space.space import SearchSpace

_GROUPS = {"attn": "attention", "cross": "attention", "mlp": "mlp"}
"""First part of a role -> its word; every other role is "other"."""


class ReadableParams:
    """Readable parameters of the candidates of a space.

    Args:
        space: It bounds the parameters. Optuna wants the bounds of a parameter to be the same in
            all trials of a study.

    Attributes:
        parameters: Name -> kind and bounds, as in `Encoder.parameters`.

    Example:
        >>> from autopeft.searcher.space.readable import ReadableParams
        >>> topology = autopeft.Topology(2, {"attn.q": (64, 64), "attn.v": (64, 64)})
        >>> space = autopeft.SearchSpace.from_source({"methods": ["lora", "ia3"]}, topology)
        >>> plan = autopeft.AdapterPlan([autopeft.LayerSpec(1, "attn.q", "lora", 8)])
        >>> candidate = autopeft.Candidate(plan, autopeft.TrainSettings(learning_rate=1e-3))
        >>> values = ReadableParams(space).of(candidate)
        >>> values["method"], values["rank"], values["adapted_blocks"], values["lowest_block"]
        ('lora', 8, 1, 1)
    """

    def __init__(self, space: SearchSpace) -> None:
        grid, config, n_layers = space.grid, space.config, space.topology.n_layers
        names = [*space.methods, *([methods.HEAD] if space.encoder.has_head else [])]
        rates = [rate for name in names for rate in space.encoder.rates(name)]
        roles = {spec.role for specs in grid.sites.values() for spec in specs}
        mixed = ["mixed"] if len(space.methods) > 1 else []
        ranks = max(option.rank for option in grid.options)
        rows: dict[str, dict[str, Any]] = {
            "learning_rate": {
                "kind": "float",
                "low": min(map(round_rate, rates)),
                "high": max(map(round_rate, rates)),
                "log": True,
            },
            "method": {"kind": "categorical", "choices": ["none", *space.methods, *mixed]},
            "rank": {"kind": "int", "low": 0, "high": ranks},
            "adapted_blocks": {"kind": "int", "low": 0, "high": n_layers},
            "lowest_block": {"kind": "int", "low": 0, "high": n_layers},
            "modules": {"kind": "categorical", "choices": _module_choices(roles)},
        }
        # What cannot vary is no parameter.
        for name, choices in config.varied.items():
            rows[name] = {"kind": "categorical", "choices": list(choices)}
        if not ranks:
            del rows["rank"]
        self.parameters: Mapping[str, Mapping[str, Any]] = rows
        self._n_layers = n_layers

    def of(self, candidate: Candidate) -> dict[str, Any]:
        """Return the parameters of a candidate; a value outside its bounds is left out.

        `rank` is the largest one, 0 if no adapter has any. `lowest_block` is where the backward
        pass ends; without adapters it is the number of blocks.
        """
        plan, train = candidate.plan, candidate.train
        lowest = plan.lowest_layer
        values = {
            "learning_rate": train.learning_rate,
            "method": _method(plan),
            "rank": max((spec.rank for spec in plan.specs), default=0),
            "adapted_blocks": len({spec.layer for spec in plan.specs if spec.role != MODEL}),
            "lowest_block": self._n_layers if lowest is None else lowest,
            "modules": _modules(spec.role for spec in plan.specs),
            "alpha": train.alpha,
            "alpha_ratio": train.alpha_ratio,
            "dropout": train.dropout,
        }
        rows = self.parameters
        return {n: v for n, v in values.items() if n in rows and _is_within(v, rows[n])}


def _is_within(value: Any, row: Mapping[str, Any]) -> bool:
    if row["kind"] == "categorical":
        return value in row["choices"]
    return bool(row["low"] <= value <= row["high"])


def _method(plan: AdapterPlan) -> str:
    return "none" if not plan.methods else plan.methods[0] if len(plan.methods) == 1 else "mixed"


def _groups(roles: Iterable[str]) -> list[str]:
    return sorted({_GROUPS.get(role.partition(".")[0], "other") for role in roles})


def _modules(roles: Iterable[str]) -> str:
    return "+".join(_groups(roles)) or "none"


def _module_choices(roles: Iterable[str]) -> list[str]:
    """Return what `_modules` can return for plans with these roles."""
    groups = _groups(roles)
    sizes = range(1, len(groups) + 1)
    subsets = (subset for size in sizes for subset in itertools.combinations(groups, size))
    return ["none", *map("+".join, subsets)]
