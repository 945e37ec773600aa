"""Fits a search to its budget: measures this machine, then chooses what the settings leave open."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from autopeft.engine.search_plan import (
    CHOICES,
    ENOUGH_TRIALS,
    LEAST_ROWS,
    LEAST_STEPS,
    Speed,
    Workload,
    choose_plan,
    minutes_for,
    pinned_sizes,
    remedy,
)
from autopeft.engine.speed import measure_speed
from autopeft.errors import SettingsError, TrainingFailure
from autopeft.models.loading import base_dtype
from autopeft.plan import Candidate
from autopeft.preparing.notes import Note
from autopeft.preparing.prepared import PreparedSearch
from autopeft.searcher.space.initial_design import N_BASELINES, N_PORTFOLIO
from autopeft.settings import SearchSettings
from autopeft.training.precision import Precision
from autopeft.utils.device import is_accelerator
from autopeft.utils.formatting import one_line
from autopeft.utils.hardware import matmul_flops_per_second

_RAY_START_SECONDS = 10.0
"""What workers take to start, without loading the model."""

_N_DRAWS = 24
"""Random candidates that stand for a search's proposals, beside its starts."""


def fitted(
    ready: PreparedSearch, asked: SearchSettings, *, began: float, note: Note
) -> PreparedSearch:
    """Return the search with sizes that suit its budget.

    A budget without seconds, and a training function of the user's, which is not run for a
    measurement, leave the usual sizes.

    Args:
        ready: The search.
        asked: What the user asked for.
        began: When the user's call began, in seconds of `time.monotonic()`.
        note: Called with lines for the user.

    Raises:
        SettingsError: if the budget cannot pay for a trial.
    """
    check_budget(ready, asked, spent_seconds=time.monotonic() - began)
    pinned = pinned_sizes(asked)
    limit, data, task = ready.budget.seconds, ready.data, ready.task
    if task is not None and not task.can_share_batch:
        # A row's loss depends on the others, so smaller batches are another problem.
        pinned.setdefault("batch_size", ready.plan.batch_size)
    candidates = ready.space.baselines()
    if limit is None or data is None or not candidates or set(CHOICES) <= set(pinned):
        return ready.with_plan(ready.plan)
    rng = np.random.default_rng(ready.settings.seed)
    draws = [ready.space.sample_stratified(rng) for _ in range(_N_DRAWS)]
    typical = [*ready.space.baselines(N_BASELINES), *ready.space.portfolio(N_PORTFOLIO), *draws]
    largest = max(candidates, key=lambda c: ready.prices.price(c).train_flops)
    try:
        speed, loading, precision = _measured(
            ready, largest, typical, few_rows=None if "batch_size" in pinned else LEAST_ROWS
        )
    except TrainingFailure as error:
        note(f"the speed could not be measured ({one_line(error)}), so nothing is planned")
        return ready.with_plan(ready.plan)
    if precision == "fp32" or base_dtype(ready.device, ready.settings.precision) == "bfloat16":
        ready = replace(ready, fp32_factor=1.0)
    is_local = ready.settings.backend == "local"
    starting = 0.0 if is_local else _RAY_START_SECONDS + loading
    work = Workload(
        budget=limit,
        seconds=limit - (time.monotonic() - began) - starting,
        n_workers=ready.settings.workers or 1,
        n_train=len(data.train),
        batch_size=ready.settings.rows_per_step,
        n_validation=ready.n_scored,
        test_share=ready.test_share,
        eta=ready.settings.eta,
        earliest_rung=ready.earliest_rung,
    )
    plan = choose_plan(speed, work, pinned)
    if (spent := time.monotonic() - began) >= limit:
        one, enough = (minutes_for(n, plan, speed, work, pinned) for n in (1, ENOUGH_TRIALS))
        raise SettingsError(
            "budget",
            ready.budget.text,
            f"starting up took {spent:.0f} s",
            f"use at least {one}m for one trial, {enough}m for {ENOUGH_TRIALS}",
        )
    plan = replace(plan, open=ready.plan.open)
    note(plan.line())
    if plan.n_trials is not None and plan.n_trials < ENOUGH_TRIALS:
        note(remedy(plan, speed, work, pinned))
    return ready.with_plan(plan)


def _measured(
    ready: PreparedSearch, largest: Candidate, typical: Sequence[Candidate], *, few_rows: int | None
) -> tuple[Speed, float, Precision]:
    """Measure the speed here, or on a worker: of the cluster that will train, or on a device.

    A worker's process ends, and with it its context on a device, whose memory all workers need.
    """
    given = (ready.context(), largest, typical, ready.prices)
    options = {"n_workers": ready.settings.workers or 1, "few_rows": few_rows}
    address, gpus = ready.settings.ray_address, ready.settings.gpus_per_worker
    if address is None and not (is_accelerator(ready.device) and ready.settings.backend == "ray"):
        return measure_speed(*given, **options)  # type: ignore[arg-type]
    from autopeft.engine.ray_devices import speed_there

    return speed_there(address, gpus or 0.0, *given, options)


def check_budget(ready: PreparedSearch, asked: SearchSettings, *, spent_seconds: float) -> None:
    """Check that the budget pays for at least one LoRA.

    A trial takes at least its FLOPs at the speed of a plain matrix multiply, so no budget that
    could work is refused. The seconds spent since the call count against the budget.
    """
    budget, plan = ready.budget, ready.plan
    candidates = ready.space.baselines() or [ready.space.reference()]
    flops = min(ready.prices.price(candidate).train_flops for candidate in candidates)
    if asked.steps is None:
        flops *= LEAST_STEPS / plan.steps
    share = 1.0 - (asked.confirm_share or 0.0)
    kept = f" and {1.0 - share:.0%} are kept for confirmation" if share < 1.0 else ""
    if budget.flops is not None and budget.flops * share < flops:
        problem = f"the cheapest LoRA trial needs {flops:.2g} FLOPs{kept}"
        remedy = f"use at least {flops * 20 / share:.1g}flops or fewer --steps"
        raise SettingsError("budget", budget.text, problem, remedy)
    if budget.seconds is None:
        return
    dtype = "bfloat16" if ready.settings.precision == "bf16" else "float32"
    # A small product is no bound for an accelerator, and would open a context there, if it is here.
    is_known = not is_accelerator(ready.device)
    seconds = flops / matmul_flops_per_second(ready.device, dtype=dtype) if is_known else 0.0
    if budget.seconds * share < spent_seconds + seconds:
        raise SettingsError(
            "budget",
            budget.text,
            f"starting up took {spent_seconds:.0f} s and the cheapest LoRA trial needs at least "
            f"{seconds:.1g} s{kept}",
            f"use at least {math.ceil((spent_seconds + 20 * seconds) / share / 60)}m "
            "or fewer --steps",
        )
