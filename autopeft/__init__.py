"""Automated adapter search: which adapter, in which layers, at what rank and rate.

The names below are imported when first used: `import autopeft` loads neither torch nor ray.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopeft.api import export, price, report, resume, search
    from autopeft.errors import AutoPeftError, UserError
    from autopeft.models.saving import load_adapter
    from autopeft.outcome import Objective, Outcome, Verdict
    from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
    from autopeft.pricing import Price, PriceTable, Topology
    from autopeft.result import Member, SearchResult
    from autopeft.search.controller import Decision, SearchController
    from autopeft.search.pruner import GapPruner
    from autopeft.search.sampler import AutoPeftSampler
    from autopeft.search.space import SearchSpace
    from autopeft.settings import SearchSettings

_HOMES = {
    "AdapterPlan": "autopeft.plan",
    "AutoPeftError": "autopeft.errors",
    "AutoPeftSampler": "autopeft.search.sampler",
    "Candidate": "autopeft.plan",
    "Decision": "autopeft.search.controller",
    "GapPruner": "autopeft.search.pruner",
    "LayerSpec": "autopeft.plan",
    "Member": "autopeft.result",
    "Objective": "autopeft.outcome",
    "Outcome": "autopeft.outcome",
    "Price": "autopeft.pricing",
    "PriceTable": "autopeft.pricing",
    "SearchController": "autopeft.search.controller",
    "SearchResult": "autopeft.result",
    "SearchSettings": "autopeft.settings",
    "SearchSpace": "autopeft.search.space",
    "Topology": "autopeft.pricing",
    "TrainSettings": "autopeft.plan",
    "UserError": "autopeft.errors",
    "Verdict": "autopeft.outcome",
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


# Two of the public functions share their names with rooms of the package, so those rooms can be
# called: `autopeft.search(...)` runs a search, `autopeft.search.controller` is still the module.
_ROOMS = ("report", "search")


class _Room(ModuleType):
    """A subpackage that is also the function of its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = getattr(importlib.import_module("autopeft.api"), self.__name__.split(".")[-1])
        return function(*args, **kwargs)


class _Package(ModuleType):
    """Makes those rooms callable at the moment the import system binds them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ROOMS and isinstance(value, ModuleType):
            value.__class__ = _Room
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"autopeft.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'autopeft' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
