"""Optuna's pruners under the names that settings use, on the rungs of a search."""

from __future__ import annotations

from optuna.pruners import (
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
)

from autopeft.searcher.pruners.registry import Rungs


def none(rungs: Rungs) -> NopPruner:
    """Stop nothing."""
    return NopPruner()


def median(rungs: Rungs) -> MedianPruner:
    """Stop what is below the median at its rung."""
    return MedianPruner()


def percentile(rungs: Rungs) -> PercentilePruner:
    """Stop all but the best 1 / eta at their rung."""
    return PercentilePruner(100.0 / rungs.eta)


def asha(rungs: Rungs) -> SuccessiveHalvingPruner:
    """Promote the best 1 / eta of each rung."""
    return SuccessiveHalvingPruner(
        min_resource=rungs.first, reduction_factor=max(2, round(rungs.eta))
    )


def hyperband(rungs: Rungs) -> HyperbandPruner:
    """Run successive halving from several first rungs."""
    return HyperbandPruner(
        min_resource=rungs.first, max_resource=rungs.last, reduction_factor=max(2, round(rungs.eta))
    )
