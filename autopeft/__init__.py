"""Automated adapter search: which adapter, in which layers, at what rank and rate.

The names below are imported when first used: `import autopeft` loads neither torch nor ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopeft.advice.advise import Advice
    from autopeft.api import (
        advise,
        compare,
        compare_table,
        export,
        init,
        preview,
        price,
        report,
        resume,
        search,
    )
    from autopeft.comparing.compare import AdapterComparison
    from autopeft.confirm.verdict import Verdict
    from autopeft.costs import Price, PriceTable, Topology
    from autopeft.costs.objectives import Cost, Objective, register_cost
    from autopeft.engine.backend import Backend, register_backend
    from autopeft.engine.callback import Callback, SearchStart
    from autopeft.engine.dispatcher import Dispatcher
    from autopeft.engine.evaluate import TrialReport, TrialStopped
    from autopeft.engine.executors import make_executor
    from autopeft.engine.messages import WorkerContext
    from autopeft.errors import AutoPeftError, UserError
    from autopeft.integrations.trackers.registry import register_tracker
    from autopeft.methods import register_method
    from autopeft.models.check_export import check_export
    from autopeft.models.saving import load_adapter
    from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
    from autopeft.result import Member, SearchResult
    from autopeft.searcher.controller import Decision, SearchController
    from autopeft.searcher.pruners.gap import GapPruner
    from autopeft.searcher.pruners.prunable import PrunableTrial, prunable
    from autopeft.searcher.pruners.registry import register_pruner
    from autopeft.searcher.samplers.optuna_adapters import AutoPeftSampler
    from autopeft.searcher.samplers.registry import register_sampler
    from autopeft.searcher.space.space import SearchSpace
    from autopeft.settings import SearchSettings
    from autopeft.tasks.base import Evaluation, Task
    from autopeft.tasks.batch import Batch
    from autopeft.tasks.columns import Column
    from autopeft.tasks.data import EncodedSplit
    from autopeft.tasks.encoding import encode_texts
    from autopeft.tasks.examples import Examples
    from autopeft.tasks.metrics import Metric, register_metric
    from autopeft.tasks.registry import register_task
    from autopeft.trial import Outcome

_NAMES = {
    "autopeft.advice.advise": ("Advice",),
    "autopeft.api": (
        *("advise", "compare", "compare_table", "export", "init"),
        *("preview", "price", "report", "resume", "search"),
    ),
    "autopeft.comparing.compare": ("AdapterComparison",),
    "autopeft.confirm.verdict": ("Verdict",),
    "autopeft.costs": ("Price", "PriceTable", "Topology"),
    "autopeft.costs.objectives": ("Cost", "Objective", "register_cost"),
    "autopeft.engine.backend": ("Backend", "register_backend"),
    "autopeft.engine.callback": ("Callback", "SearchStart"),
    "autopeft.engine.dispatcher": ("Dispatcher",),
    "autopeft.engine.evaluate": ("TrialReport", "TrialStopped"),
    "autopeft.engine.executors": ("make_executor",),
    "autopeft.engine.messages": ("WorkerContext",),
    "autopeft.errors": ("AutoPeftError", "UserError"),
    "autopeft.integrations.trackers.registry": ("register_tracker",),
    "autopeft.methods": ("register_method",),
    "autopeft.models.check_export": ("check_export",),
    "autopeft.models.saving": ("load_adapter",),
    "autopeft.plan": ("AdapterPlan", "Candidate", "LayerSpec", "TrainSettings"),
    "autopeft.result": ("Member", "SearchResult"),
    "autopeft.searcher.controller": ("Decision", "SearchController"),
    "autopeft.searcher.pruners.gap": ("GapPruner",),
    "autopeft.searcher.pruners.prunable": ("PrunableTrial", "prunable"),
    "autopeft.searcher.pruners.registry": ("register_pruner",),
    "autopeft.searcher.samplers.optuna_adapters": ("AutoPeftSampler",),
    "autopeft.searcher.samplers.registry": ("register_sampler",),
    "autopeft.searcher.space.space": ("SearchSpace",),
    "autopeft.settings": ("SearchSettings",),
    "autopeft.tasks.base": ("Evaluation", "Task"),
    "autopeft.tasks.batch": ("Batch",),
    "autopeft.tasks.columns": ("Column",),
    "autopeft.tasks.data": ("EncodedSplit",),
    "autopeft.tasks.encoding": ("encode_texts",),
    "autopeft.tasks.examples": ("Examples",),
    "autopeft.tasks.metrics": ("Metric", "register_metric"),
    "autopeft.tasks.registry": ("register_task",),
    "autopeft.trial": ("Outcome",),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}

__version__ = "0.2.0.dev0"
__all__ = [
    "AdapterComparison",
    "AdapterPlan",
    "Advice",
    "AutoPeftError",
    "AutoPeftSampler",
    "Backend",
    "Batch",
    "Callback",
    "Candidate",
    "Column",
    "Cost",
    "Decision",
    "Dispatcher",
    "EncodedSplit",
    "Evaluation",
    "Examples",
    "GapPruner",
    "LayerSpec",
    "Member",
    "Metric",
    "Objective",
    "Outcome",
    "Price",
    "PriceTable",
    "PrunableTrial",
    "SearchController",
    "SearchResult",
    "SearchSettings",
    "SearchSpace",
    "SearchStart",
    "Task",
    "Topology",
    "TrainSettings",
    "TrialReport",
    "TrialStopped",
    "UserError",
    "Verdict",
    "WorkerContext",
    "__version__",
    "advise",
    "check_export",
    "compare",
    "compare_table",
    "encode_texts",
    "export",
    "init",
    "load_adapter",
    "make_executor",
    "preview",
    "price",
    "prunable",
    "register_backend",
    "register_cost",
    "register_method",
    "register_metric",
    "register_pruner",
    "register_sampler",
    "register_task",
    "register_tracker",
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
