"""Automated adapter search: which adapter, in which layers, at what rank and rate.

The names below are imported when first used: `import autopeft` loads neither torch nor ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopeft.api import export, price, report, resume, search
    from autopeft.confirm.verdict import Verdict
    from autopeft.costs import Price, PriceTable, Topology
    from autopeft.costs.objectives import Objective
    from autopeft.errors import AutoPeftError, UserError
    from autopeft.models.saving import load_adapter
    from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
    from autopeft.result import Member, SearchResult
    from autopeft.searcher.controller import Decision, SearchController
    from autopeft.searcher.pruner import GapPruner
    from autopeft.searcher.samplers.optuna_adapters import AutoPeftSampler
    from autopeft.searcher.space.space import SearchSpace
    from autopeft.settings import SearchSettings
    from autopeft.trial import Outcome

_HOMES = {
    "AdapterPlan": "autopeft.plan",
    "AutoPeftError": "autopeft.errors",
    "AutoPeftSampler": "autopeft.searcher.samplers.optuna_adapters",
    "Candidate": "autopeft.plan",
    "Decision": "autopeft.searcher.controller",
    "GapPruner": "autopeft.searcher.pruner",
    "LayerSpec": "autopeft.plan",
    "Member": "autopeft.result",
    "Objective": "autopeft.costs.objectives",
    "Outcome": "autopeft.trial",
    "Price": "autopeft.costs",
    "PriceTable": "autopeft.costs",
    "SearchController": "autopeft.searcher.controller",
    "SearchResult": "autopeft.result",
    "SearchSettings": "autopeft.settings",
    "SearchSpace": "autopeft.searcher.space.space",
    "Topology": "autopeft.costs",
    "TrainSettings": "autopeft.plan",
    "UserError": "autopeft.errors",
    "Verdict": "autopeft.confirm.verdict",
    "export": "autopeft.api",
    "load_adapter": "autopeft.models.saving",
    "price": "autopeft.api",
    "report": "autopeft.api",
    "resume": "autopeft.api",
    "search": "autopeft.api",
}

__version__ = "0.1.0"
__all__ = [
    "AdapterPlan",
    "AutoPeftError",
    "AutoPeftSampler",
    "Candidate",
    "Decision",
    "GapPruner",
    "LayerSpec",
    "Member",
    "Objective",
    "Outcome",
    "Price",
    "PriceTable",
    "SearchController",
    "SearchResult",
    "SearchSettings",
    "SearchSpace",
    "Topology",
    "TrainSettings",
    "UserError",
    "Verdict",
    "__version__",
    "export",
    "load_adapter",
    "price",
    "report",
    "resume",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autopeft' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return __all__
