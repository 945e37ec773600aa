"""Prepares a search: reads and checks everything that can be checked before any training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from autopeft.confirm.pick import check_pick
from autopeft.costs.constraints import Constraint, check_limits, limited_costs, parse_constraints
from autopeft.costs.objectives import (
    COSTS,
    Objective,
    by_rank,
    check_costs,
    check_leading,
    find_beside,
)
from autopeft.engine.budget import Budget
from autopeft.engine.search_plan import SearchPlan
from autopeft.errors import SettingsError
from autopeft.models.layout import Layout
from autopeft.models.quantization import check_backend
from autopeft.plan_text import unsearched_text
from autopeft.preparing.memory import check_fits, checkpointed, within
from autopeft.preparing.notes import Note, Phase
from autopeft.preparing.paths import expand
from autopeft.preparing.prepared import PreparedSearch
from autopeft.preparing.trained import read_data, read_function
from autopeft.preparing.workers import devices_of, workers_of
from autopeft.searcher.space.space import SearchSpace
from autopeft.serving.servers import find_server
from autopeft.settings import AUTO, SearchSettings
from autopeft.tasks.second_tasks import checked_beside
from autopeft.training.optimizers import check_optimizer
from autopeft.training.rungs import EARLIEST_STEP


def prepare(
    settings: SearchSettings,
    *,
    note: Note = lambda _: None,
    phase: Phase = lambda _: nullcontext(),
    must_fit: bool = True,
) -> PreparedSearch:
    """Check the settings against data, model, space and machine.

    Args:
        settings: What the user asked for; the first mistake found is a UserError.
        note: Called with a line about each step.
        phase: Adds the time of its block to a phase.
        must_fit: Whether the model must fit in the memory of its devices.
    """
    budget = Budget.parse(settings.budget)
    check_pick(settings.pick)
    settings = expand(settings)
    devices, gpus = devices_of(settings)
    device = devices.kind
    check_backend(settings.quantization, device)
    check_optimizer(settings.optimizer, device)
    read = read_data if settings.evaluate is None else read_function
    found = read(settings, device, note, phase)
    prices, data, task = found.prices, found.data, found.task
    check_leading("metric", found.quality)
    objectives = (found.quality, *by_rank(map(find_beside, settings.objectives)))
    plan, asked_rungs, asked_workers = SearchPlan.of(settings), settings.rungs, settings.workers
    unserved: tuple[str, ...] = ()
    if settings.servable is not None:
        unserved = find_server(settings.servable).unserved_roles(found.layout.modules)
    if unserved:
        note(f"servable by {settings.servable}: without the modules {', '.join(unserved)}")
    space = SearchSpace.from_source(
        found.space,
        prices.topology.without(unserved),
        steps=plan.steps,
        batch_size=plan.batch_size,
        servable=settings.servable,
    )
    constraints = parse_constraints(settings.constraints, base_params=prices.base_params)
    if data is None:
        _check_returned(objectives, constraints)
    else:
        objectives = checked_beside(objectives, constraints, data.second)
    told = [o.name for o in objectives] + [c.name for c in constraints]
    told += [second.name for second in data.second] if data is not None else []
    _check_pick_is_computed(settings.pick, told)
    chosen_by = f", the default of {task.name}" if settings.space is None and task else ""
    note(f"space {space.name}{chosen_by}: {space.describe()}")
    if settings.servable is not None and space.left_out:
        note(f"servable by {settings.servable}: without {', '.join(space.left_out)}")
    unsearched = _unsearched(space, found.layout)
    if text := unsearched_text(unsearched):
        note(text)
    with phase("startup"):
        n_workers = settings.workers or (1 if settings.backend == "local" else 0)
        if not n_workers:
            n_workers, gpus = workers_of(devices, gpus, prices, space, note)
        per_block = prices.weight_bytes / max(1, prices.topology.n_layers)
        room = devices.room(gpus, block_bytes=per_block)
        if gpus > 1 and found.data is not None:
            note(f"the model's blocks are spread over {gpus:g} devices of each worker")
        if must_fit and room is not None and settings.evaluate is None:
            prices = within(prices, space, room, data)
            if settings.gradient_checkpointing == AUTO and (settings.trials_per_worker or 1) == 1:
                prices = checkpointed(prices, space, room, note)
            holding = partial(devices.holding, block_bytes=per_block)
            constraints += check_fits(prices, space, room, settings, found, note, holding)
    if task is not None:  # A function of the user's measures by itself.
        asked = replace(settings, gpus_per_worker=gpus)
        check_costs(objectives, asked, task, device)
        check_limits(constraints, asked, task, device)
    settings = replace(
        settings,
        task=settings.task or (task.name if task is not None else None),
        metric=settings.metric or found.quality.name,
        space=found.space,
        direction=found.quality.direction if task is None else None,
        workers=n_workers,
        gpus_per_worker=gpus,
        precision=found.precision,
        # A function of the user's trains by itself.
        gradient_checkpointing=prices.has_checkpointing if data is not None else AUTO,
        torch_compile=_torch_compile(settings, [*objectives, *constraints], note),
    )
    ready = PreparedSearch(
        settings,
        data,
        task,
        prices,
        space,
        objectives,
        constraints,
        budget,
        plan,
        device,
        found.window,
        unsearched,
        # What a user asks for stays; and the steps of a function of the user's may be epochs.
        earliest_rung=1 if asked_rungs is not None or data is None else EARLIEST_STEP,
        room=room,
        is_elastic=asked_workers is None and settings.ray_address is not None,
        unserved=unserved,
    )
    if text := _pack_text(ready):
        note(text)
    return ready


def _torch_compile(
    settings: SearchSettings, compared: Sequence[Objective | Constraint], note: Note
) -> bool | str:
    """Return how blocks are compiled: not by chance where the seconds of trials are compared."""
    is_compared = any(each.name == "train_seconds" for each in compared)
    if settings.torch_compile != AUTO or not is_compared:
        return settings.torch_compile
    note(
        "torch_compile=auto is off: it would compile some trials and not others, and their "
        "train_seconds are compared; true compiles all of them"
    )
    return False


def _pack_text(ready: PreparedSearch) -> str:
    """Return in words how many of the largest known plans fit together; "": as many as may be."""
    most, context = ready.trials_per_worker, ready.context()
    known = ready.space.baselines()
    if most == 1 or ready.data is None or not known:
        return ""
    largest = max(known, key=lambda c: ready.prices.price(c).peak_memory_bytes)
    fitting = most
    while fitting > 1 and not context.fits([largest] * fitting):
        fitting -= 1
    if fitting == most:
        return ""
    return f"memory of a worker is free for {fitting} of {most} of the largest LoRAs at once"


def _unsearched(space: SearchSpace, layout: Layout) -> dict[str, float]:
    """Return the share of the blocks' parameters without a role, or of experts not in the space."""
    searched = {spec.role for specs in space.grid.sites.values() for spec in specs}
    experts = {role: n for role, n in layout.experts.items() if role not in searched}
    shares = {**experts, **layout.unsearched}
    return {path: shares[path] for path in sorted(shares, key=lambda path: -shares[path])}


def _check_returned(objectives: Sequence[Objective], constraints: Sequence[Constraint]) -> None:
    """Check that a training function returns what has a limit: of qualities, the objectives."""
    names = [*(o.name for o in objectives), *limited_costs(constraints)]
    for limit in constraints:
        if limit.is_measured and limit.name not in names:
            problem = "evaluate returns no quality that is not an objective"
            remedy = f"add {limit.name} to the objectives"
            raise SettingsError("constraint", limit.text, problem, remedy)


def _check_pick_is_computed(pick: str, names: Sequence[str]) -> None:
    """Raise a SettingsError if the pick limits what is neither computed nor measured."""
    limit = check_pick(pick)
    if limit is None or limit.name in names:
        return
    cost = COSTS.get(limit.name)
    if not limit.is_measured and (cost is None or cost.function is None):
        return
    problem = f"{limit.name} is no {'quality' if cost is None else 'cost'} of this search"
    raise SettingsError("pick", pick, problem, "name it in objectives or constraints as well")
