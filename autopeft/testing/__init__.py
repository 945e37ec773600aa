"""Checks of parts of your own: does a method, task, metric, cost, backend... keep its contract?

Each check takes a part, runs it on tiny real models, and raises an `AssertionError` that names what
is wrong in one line. They are what `check_estimator` is to scikit-learn. autopeft's own parts pass
them.
"""

from __future__ import annotations

from autopeft.testing.backend import check_backend
from autopeft.testing.callback import check_callback
from autopeft.testing.cost import check_cost
from autopeft.testing.method import check_method
from autopeft.testing.metric import check_metric
from autopeft.testing.pruner import check_pruner
from autopeft.testing.task import check_task

__all__ = [
    "check_backend",
    "check_callback",
    "check_cost",
    "check_method",
    "check_metric",
    "check_pruner",
    "check_task",
]
