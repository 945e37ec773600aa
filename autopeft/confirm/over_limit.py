"""Says which limits left no LoRA to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autopeft.confirm.finalists import Finalist, mark_lora_baselines
from autopeft.costs.constraints import Constraint
from autopeft.trial import Trial
from autopeft.utils.formatting import counted


def loras_over_limits(
    trials: Sequence[Trial], finalists: Sequence[Finalist], limits: Sequence[Constraint]
) -> str | None:
    """Return how far the LoRA baselines are from keeping the limits, if each breaks one.

    Args:
        trials: All trials of the search.
        finalists: What was confirmed; the mean over its seeds counts in place of its trial.
        limits: Limits on measured values.

    Returns:
        None if a baseline keeps them, or there is none.
    """
    confirmed = {f.digest: f.measured() for f in finalists}
    found: list[Mapping[str, float]] = [
        confirmed.get(trial.digest, trial.measured)
        for trial in mark_lora_baselines(trials)
        if trial.origin == "baseline" and trial.state == "complete"
    ]
    broken = [limit for limit in limits if any(_breaks(limit, values) for values in found)]
    if not found or not all(any(_breaks(limit, each) for limit in broken) for each in found):
        return None
    parts = []
    for limit in broken:
        best = _shown(limit, min(found, key=limit.excess)[limit.name])
        parts.append(f"{limit.text}, where the best has {best}")
    who = f"all {counted(len(found), 'LoRA baseline')}" if len(found) > 1 else "the LoRA baseline"
    verb = "break" if len(found) > 1 else "breaks"
    what = "a limit of" if len(parts) > 1 else "the limit"
    return f"{who} {verb} {what} {'; '.join(parts)}"


def _shown(limit: Constraint, value: float) -> str:
    cost = limit.measured_cost
    return f"{value:.3g}" if cost is None else f"{value:.4g} {cost.unit}".rstrip()


def _breaks(limit: Constraint, values: Mapping[str, float]) -> bool:
    return not limit.excess(values) <= 0
