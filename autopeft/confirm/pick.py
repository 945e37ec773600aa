"""The pick: which finalist to recommend. Validation scores alone choose it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autopeft.confirm.comparison import (
    cost_of,
    is_told_by_logarithm,
    pooled_seed_variance,
    quality_and_cost,
    row_variance,
)
from autopeft.confirm.finalists import Finalist
from autopeft.costs.constraints import Constraint, is_limit
from autopeft.costs.objectives import Objective
from autopeft.errors import SettingsError
from autopeft.utils.pareto import knee, one_standard_error

PICKS: tuple[str, ...] = ("one_se", "knee", "best_quality")
"""Rules of `pick_best`."""


def check_pick(rule: str) -> Constraint | None:
    """Return the limit that a pick rule states, or None for a named rule."""
    if rule in PICKS:
        return None
    if not is_limit(rule):
        remedy = f"use {', '.join(PICKS)}, or a limit such as trainable_params<=50k"
        raise SettingsError("pick", rule, "no such rule", remedy)
    try:
        return Constraint.parse(rule)
    except SettingsError as error:
        raise SettingsError("pick", rule, error.problem, error.remedy) from None


def pick_best(
    finalists: Sequence[Finalist], objectives: Sequence[Objective], *, rule: str = "one_se"
) -> str | None:
    """Return the digest of the finalist to recommend, chosen on validation.

    Args:
        finalists: The reference is picked only if there is nothing else.
        objectives: Quality first; the cost is the second.
        rule: "one_se": the cheapest within one standard error of the best; "knee": the knee of the
            front; "best_quality"; or a limit such as "trainable_params<=50k": the best within it,
            by the mean over its seeds where it is measured.

    Returns:
        None if there is no finalist, or none within the limit.
    """
    limit = check_pick(rule)
    rows = [f for f in finalists if f.seeds and f.origin != "reference"]
    if limit is not None:
        rows = [f for f in rows if limit.is_kept(f.costs, f.measured())]
    else:
        rows = rows or [f for f in finalists if f.seeds]
    if not rows:
        return None
    quality, cost = quality_and_cost(objectives)
    scores = np.array([quality.sign() * f.mean(quality.name, "validation") for f in rows])
    costs = np.array([cost_of(f, cost) for f in rows])
    if rule == "knee" and cost is not None:
        shown = np.log(costs) if (costs > 0).all() else costs
        return rows[knee(np.column_stack([scores, -shown]))].digest
    if rule == "one_se" and cost is not None:
        if is_told_by_logarithm(rows, quality):
            # The mean of the logarithms, as the errors are.
            told = [[math.log(s.validation[quality.name]) for s in f.seeds] for f in rows]
            scores = quality.sign() * np.array([np.mean(each) for each in told])
        between = pooled_seed_variance(rows, quality)
        errors = np.array([np.sqrt(between / len(f.seeds) + row_variance(f)) for f in rows])
        return rows[one_standard_error(scores, errors, costs)].digest
    return rows[int(np.argmax(scores))].digest
