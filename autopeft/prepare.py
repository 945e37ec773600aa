"""Prepares a search: reads and checks everything that can be checked before any training."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autopeft.confirm.pick import check_pick
from autopeft.costs import PriceTable
from autopeft.costs.constraints import Constraint, parse_constraints
from autopeft.costs.objectives import COSTS, QUALITIES, Objective, default_direction, find_beside
from autopeft.engine.budget import Budget
from autopeft.engine.devices import WORKER_BYTES, Devices, devices_here, per_device
from autopeft.engine.evaluate import EVALUATORS
from autopeft.engine.messages import WorkerContext
from autopeft.engine.search_plan import CHOICES, SearchPlan
from autopeft.errors import DataError, ModelError, SettingsError, UserError
from autopeft.models.attention import check_attention, use_attention
from autopeft.models.backbone import Backbone, build_meta
from autopeft.models.layout import Layout
from autopeft.models.loading import (
    base_dtype,
    embedding_rows,
    load_config,
    own_auto_class,
    position_limit,
)
from autopeft.models.quantization import NONE, check_backend
from autopeft.plan_text import unsearched_text
from autopeft.profiling.causality import sees_later_tokens
from autopeft.profiling.end_tokens import takes_end_tokens
from autopeft.profiling.fake_tensors import InputShape
from autopeft.profiling.fits import Fitting, Load
from autopeft.profiling.measure import price_table
from autopeft.profiling.output_positions import n_logit_weights, read_positions
from autopeft.profiling.packing import keeps_rows_apart
from autopeft.searcher.space.config import prompt_sizes
from autopeft.searcher.space.space import SearchSpace
from autopeft.settings import AUTO, SearchSettings, Source
from autopeft.tasks.base import Task
from autopeft.tasks.batch import collate
from autopeft.tasks.data import SplitName, TaskData
from autopeft.tasks.load_data import load_data, read_tables
from autopeft.tasks.packing import packed_batch, packed_shape, usual_bins
from autopeft.tasks.registry import make_task
from autopeft.tasks.retained import load_retained
from autopeft.tasks.summary import DataSummary
from autopeft.training.activation_cache import MEMORY_SHARE, ActivationStore, room_on_disk
from autopeft.training.batching import rung_sample, training_batches
from autopeft.training.evaluation import token_budget
from autopeft.training.optimizers import check_optimizer, moments_of
from autopeft.training.precision import choose_precision
from autopeft.training.rungs import EARLIEST_STEP, rung_steps
from autopeft.utils.device import is_here, kind_of
from autopeft.utils.formatting import human_bytes
from autopeft.utils.hardware import available_memory_bytes, n_cores, n_parallel_cores, one_thread
from autopeft.utils.registry import carried
from autopeft.utils.versions import versions

AUTO_TRIALS_PER_WORKER = {"cpu": 1, "accelerator": 4}
"""Candidates trained together by default. A CPU gains a tenth at 16 rows a step, too little to
propose several at once; on a GPU each worker first measures whether it pays."""


PACKED_STEPS = 512
"""Steps whose packed rows are counted: their sizes differ as lengths do."""

Note = Callable[[str], None]
Phase = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class PreparedSearch:
    """A search that is ready to start.

    Attributes:
        settings: As resolved: paths expanded, what was left to task and machine filled in.
        data: The encoded data; None, as `task`, if a function of the user's trains.
        objectives: Quality first.
        plan: How large trainings and confirmation are.
        device: Type of the workers' device, as torch names it.
        window: Which of the task's windows the model's head reads; None: all positions, or unknown.
        unsearched: Path inside a block -> share of the blocks' parameters that have no role there;
            also roles of experts that are not in the space.
        earliest_rung: Rungs before this step are left out.
        room: Bytes that a worker can allocate on its device; None: not known.
        is_elastic: Whether the number of workers follows the nodes of a cluster.
        fp32_factor: Time to score rows in fp32, as the test split is, over that of the trainings'
            precision.
    """

    settings: SearchSettings
    data: TaskData | None
    task: Task | None
    prices: PriceTable
    space: SearchSpace
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]
    budget: Budget
    plan: SearchPlan
    device: str
    window: str | None = None
    unsearched: Mapping[str, float] = field(default_factory=dict)
    fp32_factor: float = 2.0
    earliest_rung: int = EARLIEST_STEP
    room: float | None = None
    is_elastic: bool = False

    @property
    def trials_per_worker(self) -> int:
        """Candidates a worker trains together, at most."""
        if self.settings.trains_alone:
            return 1
        return self.settings.trials_per_worker or AUTO_TRIALS_PER_WORKER[kind_of(self.device)]

    @property
    def test_share(self) -> float:
        """Time to score the test split over time to score the validation split."""
        if self.data is None:
            return 0.0
        return self.fp32_factor * len(self.data.test) / len(self.data.validation)

    @property
    def rungs(self) -> tuple[int, ...]:
        """Steps at which trials report."""
        plan = self.plan
        return rung_steps(plan.steps, self.settings.eta, plan.rungs, earliest=self.earliest_rung)

    def with_plan(self, plan: SearchPlan) -> PreparedSearch:
        """Return the search with other sizes."""
        sizes: dict[str, Any] = {name: getattr(plan, name) for name in CHOICES}
        # As many as there are: resuming, they are asked for.
        sizes["rungs"] = len(replace(self, plan=plan).rungs)
        if self.data is None:
            del sizes["rung_rows"]  # A training function scores its own rows.
        source, settings = self.settings.space, replace(self.settings, **sizes)
        assert source is not None, "settings are resolved"
        prices = self.prices
        if plan.batch_size != prices.batch_size:
            # A search that is resumed prices the same batches.
            assert self.data is not None, "a function's batches are not planned"
            assert self.task is not None, "there are data"
            meta = meta_of(settings, self.data, self.task)
            prices = _prices(meta, settings, self.data, self.task, source, self.window, self.device)
        space = SearchSpace.from_source(
            source,
            prices.topology,
            steps=plan.steps,
            batch_size=plan.batch_size,
            servable=settings.servable,
        )
        prices = _within(prices, space, self.room, self.data)
        return replace(self, plan=plan, space=space, settings=settings, prices=prices)

    def summary(self) -> DataSummary:
        """Return what was read."""
        return self.data.summary() if self.data is not None else DataSummary()

    @property
    def is_of_text(self) -> bool:
        """Whether the quality is a metric of text that autopeft generates."""
        if self.task is None:
            return False
        name = self.task.quality.name
        return any(m.name == name and m.needs == "text" for m in self.task.measured)

    def n_generated(self, split: SplitName) -> int:
        """Return the number of rows of a split that text is generated for."""
        assert self.data is not None, "only a task generates text"
        return min(len(self.data.splits[split]), self.settings.generation_rows)

    def splits(self) -> dict[str, Any]:
        """Return the source rows of each split; re-scoring from outside needs them.

        "generated" are those of them that text is generated for, if a metric needs it.
        """
        found: dict[str, Any] = {}
        if self.data is None or self.task is None:
            return found
        for name, rows in self.data.splits.items():
            found[name] = {"source": rows.source, "rows": rows.source_rows.tolist()}
            if self.task.needs_text() and name != "train":
                sample = rung_sample(len(rows), self.settings.generation_rows)
                of_text = rows.source_rows if sample is None else rows.source_rows[sample]
                found[name]["generated"] = of_text.tolist()
        return found

    def context(self) -> WorkerContext:
        """Return what the workers need."""
        model = self.settings.model
        # What one process runs need not be picklable, nor an earlier search's function.
        is_local = self.settings.backend == "local"
        without = () if self.settings.evaluate is not None else (EVALUATORS.group,)
        if Path(model).exists():
            # Workers run in another directory.
            model = str(Path(model).absolute())
        return WorkerContext(
            settings=replace(self.settings, model=model),
            data=self.data,
            rungs=self.rungs,
            objectives=tuple(o.name for o in self.objectives),
            device=self.device,
            window=self.window,
            head_params=self.prices.topology.head_params,
            carried=None if is_local else carried(without=without),
            trials_per_worker=self.trials_per_worker,
            prices=self.prices,
            room=self.room,
            is_elastic=self.is_elastic,
            versions=versions(),
        )


def expand(settings: SearchSettings, *, needs_data: bool = True) -> SearchSettings:
    """Return settings with `~` and `$VARIABLES` expanded in every path."""
    needs_data = needs_data and not settings.evaluate
    for name in ("model", "data") if needs_data else ("model",):
        if not getattr(settings, name):
            raise SettingsError(name, "", "is missing", f"give --{name}")

    def path(value: str) -> str:
        return os.path.expanduser(os.path.expandvars(value))

    def source(value: Source) -> Source:
        return path(value) if isinstance(value, str) else tuple(map(path, value))

    return replace(
        settings,
        model=path(settings.model),
        data=source(settings.data),
        validation=None if settings.validation is None else source(settings.validation),
        test=None if settings.test is None else source(settings.test),
        retain=None if settings.retain is None else path(settings.retain),
    )


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
    devices, gpus = _devices(settings)
    device = devices.kind
    check_backend(settings.quantization, device)
    check_optimizer(settings.optimizer, device)
    read = _read_data if settings.evaluate is None else _read_function
    found = read(settings, device, note, phase)
    prices, data, task = found.prices, found.data, found.task
    beside = sorted(map(find_beside, settings.objectives), key=lambda o: not o.is_cost)
    objectives = (found.quality, *beside)  # The first after the quality is a cost.
    plan, asked_rungs, asked_workers = SearchPlan.of(settings), settings.rungs, settings.workers
    space = SearchSpace.from_source(
        found.space,
        prices.topology,
        steps=plan.steps,
        batch_size=plan.batch_size,
        servable=settings.servable,
    )
    constraints = parse_constraints(settings.constraints, base_params=prices.base_params)
    _check_retains(settings, [o.name for o in objectives], constraints)
    _check_pick_is_computed(
        settings.pick, (*(o.name for o in objectives), *(c.name for c in constraints))
    )
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
            n_workers, gpus = _workers(devices, gpus, prices, space, note)
        per_block = prices.weight_bytes / max(1, prices.topology.n_layers)
        room = devices.room(gpus, block_bytes=per_block)
        if gpus > 1 and found.data is not None:
            note(f"the model's blocks are spread over {gpus:g} devices of each worker")
        if must_fit and room is not None and settings.evaluate is None:
            prices = _within(prices, space, room, data)
            if settings.gradient_checkpointing == AUTO and (settings.trials_per_worker or 1) == 1:
                prices = _checkpointed(prices, space, room, note)
            holding = partial(devices.holding, block_bytes=per_block)
            constraints += _check_fits(prices, space, room, settings, found, note, holding)
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
        torch_compile=_torch_compile(settings, objectives, note),
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
    )
    if text := _pack_text(ready):
        note(text)
    return ready


def _torch_compile(
    settings: SearchSettings, objectives: Sequence[Objective], note: Note
) -> bool | str:
    """Return how blocks are compiled: not by chance where the seconds of trials are compared."""
    is_compared = any(each.name == "train_seconds" for each in objectives)
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


@dataclass(frozen=True)
class _Training:
    """What is trained, and what it costs."""

    quality: Objective
    space: str | Mapping[str, Any]
    prices: PriceTable
    layout: Layout
    data: TaskData | None = None
    task: Task | None = None
    window: str | None = None
    precision: str = "auto"


def _read_data(settings: SearchSettings, device: str, note: Note, phase: Phase) -> _Training:
    """Read the data, and price training on them."""
    if settings.direction is not None:
        problem = "is for the metric that `evaluate` returns; metrics of tasks have their own"
        raise SettingsError("direction", settings.direction, problem, "leave it out")
    with phase("startup"):
        data, task = load_task(settings)
        if settings.micro_batch_tokens is not None and not task.can_share_batch:
            problem = f"{task.name} compares all rows of a step, which cannot be split"
            value = settings.micro_batch_tokens
            raise SettingsError("micro_batch_tokens", value, problem, "leave it out")
        read = data.summary()
        note("\n  ".join([read.headline(), *read.lines()]))
    source = task.space if settings.space is None else settings.space
    with phase("pricing"):
        meta = meta_of(settings, data, task)
        window = read_window(meta, task, data)
        # Settled here: workers that measured it each for themselves might differ.
        asked = task.auto_precision if settings.precision == "auto" else settings.precision
        if is_here(device):
            with one_thread(device):
                asked = choose_precision(asked, device, meta.model.config)
        settings = replace(settings, precision=asked)
        check_attention(settings.attn_implementation, meta.model, device, asked)
        prices = _prices(meta, settings, data, task, source, window, device, note)
    return _Training(task.quality, source, prices, meta.layout, data, task, window, asked)


def _can_cache(settings: SearchSettings, data: TaskData, meta: Backbone, note: Note) -> bool:
    """Return whether the activation cache can hold the training rows; say so if it cannot."""
    block = meta.topology.shape(0, "block")
    if not settings.activation_cache or not data.train.has_tokens or block is None:
        return settings.activation_cache and data.train.has_tokens
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    size = ActivationStore.size_of(data.train, block[1], dtype) / 2**30
    if size > settings.activation_cache_gb:
        has_room, limit = False, f"--activation-cache-gb allows {settings.activation_cache_gb:g}"
    else:
        has_room, limit = _has_room(settings, int(size * 2**30))
    if not has_room:
        note(f"the activation cache is off: the training rows need {size:.3g} GiB, {limit}")
    return has_room


def _has_room(settings: SearchSettings, size: int) -> tuple[bool, str]:
    """Return whether states have room on this machine's disk or in its memory, and what limits it.

    The workers of a cluster have disks of their own.
    """
    if settings.ray_address is not None:
        return True, ""
    folder = Path(tempfile.gettempdir())
    on_disk = room_on_disk(folder)
    share = MEMORY_SHARE / (settings.workers or n_cores())
    has_room = size <= max(on_disk, share * (available_memory_bytes() or 0))
    return has_room, f"{folder} and the memory have no room for them"


def meta_of(settings: SearchSettings, data: TaskData, task: Task) -> Backbone:
    """Build the model of a task without its weights."""
    meta = build_meta(
        settings.model,
        auto_class=task.auto_class,
        model_kwargs=task.model_kwargs(),
        revision=settings.model_revision,
        role_map=settings.role_map,
        quantization=settings.quantization,
        replaces_head=data.replaces_head,
    )
    if settings.attn_implementation == "eager":
        # It keeps every pair of tokens, and is priced so. The others need what SDPA needs.
        use_attention("eager", meta.model)
    return meta


def _prices(
    meta: Backbone,
    settings: SearchSettings,
    data: TaskData,
    task: Task,
    source: str | Mapping[str, Any],
    window: str | None,
    device: str,
    note: Note = lambda _: None,
) -> PriceTable:
    """Price training the model on the data in batches of the settings' rows."""
    n_rows, per_row = settings.rows_per_step, data.train.sequences_per_row
    lengths = data.length_statistics(n_rows)
    mean_length, largest = lengths.mean_padded, None
    if settings.packing:
        mean_length, largest = _packed(data, n_rows, note)
    prices = price_table(
        meta,
        batch_size=n_rows * per_row,
        mean_length=mean_length,
        longest_length=lengths.longest,
        prompt_sizes=prompt_sizes(source),
        device=device,
        inputs=InputShape(data.input_shapes, lengths.source_share, lengths.target_share),
        dtype=base_dtype(device, settings.precision),
        packed=largest,
    )
    if per_row > 1:
        # Prices are by rows, whatever a row holds.
        longer = {size: replace(table, batch_size=n_rows) for size, table in prices.longer.items()}
        prices = replace(prices, batch_size=n_rows, longer=longer)
    return prices.as_trained(
        has_activation_cache=_can_cache(settings, data, meta, note),
        read_share=1.0 if window is None else read_share(task, data, window, settings),
        # Others compute all their logits.
        logit_weights=n_logit_weights(meta) if task.is_autoregressive else 0,
        logit_tokens=lengths.mean_targets * n_rows,
        most_logit_tokens=lengths.most_targets * n_rows if task.is_autoregressive else 0.0,
        scoring_tokens=_scoring_tokens(data, device, prices.vocabulary),
        has_checkpointing=settings.gradient_checkpointing is True,
        pass_tokens=settings.micro_batch_tokens,
        moments=moments_of(settings.optimizer),
    )


def _packed(data: TaskData, n_rows: int, note: Note) -> tuple[float, tuple[int, int]]:
    """Return the mean tokens of a packed row, and the sequences and tokens of the largest step."""
    batches = islice(training_batches(data.train.lengths, n_rows, 0), PACKED_STEPS)
    of_rows = [data.train.lengths[rows] for rows in batches]
    padded = [(len(each), int(each.max())) for each in of_rows]
    packed = [
        min(packed_shape(each, usual_bins(each)), whole, key=math.prod)
        for each, whole in zip(of_rows, padded, strict=True)
    ]
    n_packed, n_padded = (sum(map(math.prod, shapes)) for shapes in (packed, padded))
    note(
        f"packing: a step has {n_packed / len(packed):.0f} tokens in place of "
        f"{n_padded / len(packed):.0f}"
    )
    return n_packed / sum(map(len, of_rows)), max(packed, key=math.prod)


def load_of(settings: SearchSettings, data: TaskData, task: Task) -> Load:
    """Return what a training step on the data holds at most."""
    lengths, per_row = data.length_statistics(settings.rows_per_step), data.train.sequences_per_row
    share = lengths.most_targets / (lengths.longest * per_row)
    return Load(
        settings.rows_per_step,
        lengths.longest,
        longest=task.length_limit(),
        target_share=share if task.is_autoregressive else 0.0,
        sequences_per_row=per_row,
        inputs=InputShape(data.input_shapes, lengths.source_share, lengths.target_share),
    )


def _unsearched(space: SearchSpace, layout: Layout) -> dict[str, float]:
    """Return the share of the blocks' parameters without a role, or of experts not in the space."""
    searched = {spec.role for specs in space.grid.sites.values() for spec in specs}
    experts = {role: n for role, n in layout.experts.items() if role not in searched}
    shares = {**experts, **layout.unsearched}
    return {path: shares[path] for path in sorted(shares, key=lambda path: -shares[path])}


def _scoring_tokens(data: TaskData, device: str, vocabulary: int) -> int:
    """Return the padded tokens of the largest batch that is scored."""
    budget = token_budget(device, vocabulary)
    splits = [rows for name, rows in data.splits.items() if name != "train" and len(rows)]
    longest = max(int(rows.lengths.max()) for rows in splits)
    whole = max(int(rows.lengths.max()) * len(rows) for rows in splits)
    return max(longest, min(budget, whole))


_UNUSED_BY_FUNCTION = (
    *("data", "task", "text", "text_pair", "label", "prompt", "completion", "columns", "test"),
    *("retain", "retain_rows"),
    *("task_options", "validation", "data_name", "data_revision", "on_long", "generation_rows"),
    *("max_train_rows", "max_validation_rows", "max_test_rows", "rung_rows", "precision"),
    "max_data_gb",
    *("activation_cache", "activation_cache_gb", "trials_per_worker", "compress"),
    *("gradient_checkpointing", "micro_batch_tokens", "packing", "optimizer"),
    "torch_compile",
    "attn_implementation",
)
"""Settings of autopeft's own training, which a function of the user's does not see."""

_FUNCTION_LENGTH = 128
"""Tokens of a row for the costs of a function that says nothing of its rows."""


def _read_function(settings: SearchSettings, device: str, note: Note, phase: Phase) -> _Training:
    """Check a training function, and price training the model."""
    name = settings.evaluate
    assert name is not None
    EVALUATORS.check_known("evaluate", name, example="function")
    EVALUATORS.resolve("evaluate", name)
    for each in fields(settings):
        value = getattr(settings, each.name)
        if each.name in _UNUSED_BY_FUNCTION and value != each.default:
            problem = "has no effect beside evaluate, which trains by itself"
            raise SettingsError(each.name, value, problem, "leave it out")
    if not settings.metric:
        problem = "is missing: the name of the quality that evaluate returns"
        raise SettingsError("metric", "", problem, "name it, e.g. metric=accuracy")
    quality = Objective(
        settings.metric,
        settings.direction or default_direction(settings.metric),  # type: ignore[arg-type]
    )
    source = Task.space if settings.space is None else settings.space
    with phase("pricing"):
        config, _ = load_config(settings.model, model_kwargs=None, revision=settings.model_revision)
        auto_class = own_auto_class(config)
        limit = position_limit(config)
        length = settings.max_length or min(_FUNCTION_LENGTH, limit or _FUNCTION_LENGTH)
        if limit is not None and length > limit:
            problem = f"the model has positions for {limit} tokens"
            raise SettingsError("max_length", length, problem, f"use at most {limit}")
        meta = build_meta(
            settings.model,
            auto_class=auto_class,
            revision=settings.model_revision,
            role_map=settings.role_map,
            quantization=settings.quantization,
        )
        prices = price_table(
            meta,
            batch_size=settings.rows_per_step,
            mean_length=length,
            longest_length=length,
            prompt_sizes=prompt_sizes(source),
            device=device,
        ).as_trained(
            has_activation_cache=False,
            logit_weights=n_logit_weights(meta),
            logit_tokens=float(length * settings.rows_per_step),
        )
    note(
        f"{settings.evaluate} trains {auto_class} and returns {quality.name}, which is "
        f"{quality.direction}d; costs are those of {settings.rows_per_step} rows of "
        f"{length} tokens a step (batch_size, max_length)"
    )
    return _Training(quality, source, prices, meta.layout)


def _check_retains(
    settings: SearchSettings, objectives: Sequence[str], constraints: Sequence[Constraint]
) -> None:
    """Raise a SettingsError if forgetting is asked for, but nothing says of what."""
    limits = [limit for limit in constraints if limit.is_measured]
    if settings.evaluate is not None:
        for limit in limits:
            if limit.name not in objectives:
                problem = "evaluate returns what is an objective only"
                remedy = f"add {limit.name} to the objectives"
                raise SettingsError("constraint", limit.text, problem, remedy)
        return
    asked = [name for name in (*objectives, *(limit.name for limit in limits)) if name in QUALITIES]
    if asked and settings.retain is None:
        problem = f"is missing, so {asked[0]} cannot be measured"
        raise SettingsError("retain", "", problem, "give a text file, e.g. retain=wikitext")


def _check_pick_is_computed(pick: str, names: Sequence[str]) -> None:
    """Raise a SettingsError if the pick limits a registered cost that is not computed."""
    limit = check_pick(pick)
    if limit is None or limit.name in names or COSTS[limit.name].function is None:
        return
    problem = f"{limit.name} is no cost of this search"
    raise SettingsError("pick", pick, problem, "name it in objectives or constraints as well")


def load_task(settings: SearchSettings) -> tuple[TaskData, Task]:
    """Return the encoded data of a search, and the task bound to them."""
    if settings.evaluate is not None:
        problem = "trains by itself, so autopeft reads no rows"
        raise SettingsError("evaluate", settings.evaluate, problem, "leave it out, and name data")
    tables = read_tables(settings)
    config, _ = load_config(settings.model, model_kwargs=None, revision=settings.model_revision)
    task = make_task(settings, tables["train"], config)
    if task.is_autoregressive and sees_later_tokens(config, task.auto_class):
        raise ModelError(
            "model",
            settings.model,
            f"sees later tokens, so {task.name} would learn nothing: it reads the answer",
            "use a decoder, or another --task",
        )
    if settings.packing and not (task.can_pack and keeps_rows_apart(config, task.auto_class)):
        who = f"{config.model_type} does not keep packed rows apart"
        problem = who if task.can_pack else f"{task.name} takes each row in a sequence of its own"
        raise SettingsError("packing", True, problem, "leave it out")
    processor = task.processor = task.load_processor(settings.model, settings.model_revision)
    data = load_data(settings, task, processor, tables, model_limit=task.length_limit())
    check_token_ids(settings.model, data, processor, embedding_rows(config))
    check_end_tokens(settings.model, data, config, task.auto_class)
    task = task.bound(data)
    task.check_metrics(data)
    data = load_retained(settings, task, processor, data, tables.values())
    return data, task


def check_token_ids(model: str, data: TaskData, tokenizer: Any, n_rows: int | None) -> None:
    """Check that the model's input embedding has a row for each token of the data.

    Args:
        model: Folder or hub id of the model.
        data: The encoded data.
        tokenizer: What encoded it: a tokenizer, or a processor that has one.
        n_rows: Rows of the embedding; None: it has none, or they are unknown.

    Raises:
        ModelError: if it lacks one: tokenizer and model do not belong together.
    """
    splits = data.splits.values()
    tokens = [split.tokens for split in splits if split.has_tokens]
    tokens += [split.ragged["labels"].values for split in splits if "labels" in split.ragged]
    if n_rows is None or not tokens:
        return
    largest = max(data.pad_id, *(int(ids.max()) for ids in tokens))
    if largest >= n_rows:
        word = getattr(tokenizer, "tokenizer", tokenizer).convert_ids_to_tokens(largest)
        raise ModelError(
            "model",
            model,
            f"its tokenizer has the token {largest} ({word}), its embedding has {n_rows} rows: "
            "they do not belong together",
            "save the model's own tokenizer beside it, or call "
            "model.resize_token_embeddings(len(tokenizer)) and save the model",
        )


def check_end_tokens(model: str, data: TaskData, config: Any, auto_class: str) -> None:
    """Check that a model that classifies a text by its end token finds it in each row.

    Args:
        model: Folder or hub id of the model.
        data: The encoded data.
        config: The model's configuration, from transformers.
        auto_class: Name of the class of transformers that loads it.

    Raises:
        ModelError: if the tokenizer adds none.
        DataError: if a row has more or fewer of them than the others.
    """
    end = getattr(config, "eos_token_id", None)
    splits = [split for split in data.splits.values() if split.has_tokens]
    if not getattr(config, "is_encoder_decoder", False) or not isinstance(end, int) or not splits:
        return
    found = [np.append(0, np.cumsum(split.tokens == end))[split.offsets] for split in splits]
    counts = [np.diff(ends) for ends in found]
    numbers, rows = np.unique(np.concatenate(counts), return_counts=True)
    usual = int(numbers[rows.argmax()])
    if len(numbers) == 1 and usual > 0:
        return
    if takes_end_tokens(config, auto_class, numbers.tolist()) is not False:
        return
    kind = f"is {config.model_type}, which classifies a text at its end token ({end})"
    if usual == 0:
        raise ModelError(
            "model",
            model,
            f"{kind}, but its tokenizer adds none",
            "save the model's own tokenizer beside it, one that ends each text with that token",
        )
    for split, of_rows in zip(splits, counts, strict=True):
        for row in np.flatnonzero(of_rows != usual)[:1]:
            number = int(split.source_rows[row // split.sequences_per_row]) + 1
            raise DataError(
                "data",
                split.source,
                f"row {number} has {of_rows[row]} end tokens, most rows {usual}; the model {kind} "
                "and takes rows with equally many only",
                "take the end token out of the text, or use an encoder",
            )


def read_window(meta: Backbone, task: Task, data: TaskData) -> str | None:
    """Return which of the task's windows holds all hidden states that the model's head reads.

    None where the head reads other states too, or it is unknown. A few rows of `data` are tried.
    """
    if not data.train.has_tokens:
        return None
    # Short and long rows: in rows of one length several windows coincide.
    order = np.argsort(data.train.lengths, kind="stable")
    batch = collate(data, "train", np.unique(np.concatenate([order[:2], order[-2:]])))
    rows, length = batch.input_ids.shape
    read = read_positions(meta, lambda model: task.probe_loss(model, batch), rows, length)
    if read is None:
        return None
    fitting = [
        name
        for name, window in task.windows(batch).items()
        if not bool((read & ~window.mask(length)).any())
    ]
    return fitting[0] if len(fitting) == 1 else None


def read_share(task: Task, data: TaskData, window: str, settings: SearchSettings) -> float:
    """Return the share of tokens (padding included) of training batches inside a window."""
    n_read = n_tokens = 0
    for rows in islice(training_batches(data.train.lengths, settings.rows_per_step, 0), 32):
        if settings.packing:
            batch = packed_batch(data, "train", rows, usual_bins(data.train.lengths[rows]))
        else:
            batch = collate(data, "train", rows)
        n_read += len(batch.input_ids) * task.windows(batch)[window].size
        n_tokens += batch.input_ids.numel()
    return n_read / n_tokens


def validation_rows(settings: SearchSettings, n_rows: int = 32) -> dict[str, Any] | None:
    """Return the first validation rows of a search as model inputs; None if its data is gone."""
    settings = expand(settings)
    if settings.evaluate is not None:
        return None
    try:
        data, _ = load_task(settings)
    except UserError:
        return None
    n = min(n_rows, len(data.validation))
    return collate(data, "validation", np.arange(n, dtype=np.int64)).model_inputs()


def find_devices(ray_address: str | None) -> Devices:
    """Return the devices of a Ray cluster, or of this machine without an address.

    Raises:
        SettingsError: if no cluster answers, or its accelerators cannot be used.
    """
    if ray_address is None:
        return devices_here()
    from autopeft.engine.ray_devices import cluster_devices

    return cluster_devices(ray_address)


def _devices(settings: SearchSettings) -> tuple[Devices, float]:
    """Return the workers' devices, and the share of one that a worker has."""
    found, wanted = find_devices(settings.ray_address), settings.gpus_per_worker
    if wanted and not found.count:
        where = "there" if settings.ray_address is not None else "here"
        problem = f"no accelerator is seen {where}"
        raise SettingsError("gpus_per_worker", wanted, problem, "leave it out")
    if wanted and wanted > found.most_per_worker:
        problem = f"a machine has {found.most_per_worker}"
        raise SettingsError(
            "gpus_per_worker", wanted, problem, f"use at most {found.most_per_worker}"
        )
    if wanted == 0:
        found = found.without_accelerators()
    return found, (wanted or 1.0) if found.count else 0.0


def _check_fits(
    prices: PriceTable,
    space: SearchSpace,
    room: float,
    settings: SearchSettings,
    found: _Training,
    note: Note,
    holding: Callable[[float], int | None],
) -> tuple[Constraint, ...]:
    """Check that a model fits, before it is loaded; return the limit that memory sets, if any.

    `holding` says how many devices of a worker hold so many bytes.

    Raises:
        ModelError: if the cheapest candidate does not fit.
    """
    candidates = space.baselines() or (space.reference(), *space.portfolio())
    cheapest = min(candidates, key=lambda c: prices.price(c).peak_memory_bytes)
    needed = prices.price(cheapest).peak_memory_bytes
    if needed > room:
        problem = f"the cheapest training needs {human_bytes(needed)}, {human_bytes(room)} are free"
        remedy = "use a smaller batch_size or max_length"
        if found.data is not None and found.task is not None:
            meta = meta_of(replace(settings, quantization=NONE), found.data, found.task)
            load = load_of(settings, found.data, found.task)
            dtype = "bfloat16" if prices.float_bytes == 2 else "float32"
            fitting = Fitting(meta, load, device="cpu", dtype=dtype)
            remedy = fitting.remedy(room, cheapest.plan)
        if (count := holding(needed)) is not None:
            remedy += f"; or use gpus_per_worker={count}"
        raise ModelError("model", settings.model, problem, remedy)
    rng = np.random.default_rng(0)
    draws = [*candidates, *space.portfolio(), *(space.sample_stratified(rng) for _ in range(64))]
    if max(prices.price(c).peak_memory_bytes for c in draws) <= room / 2:
        return ()  # No candidate comes near.
    note(f"candidates that need more than {human_bytes(room)} of memory are not trained")
    return (Constraint("peak_memory_bytes", room, f"peak_memory_bytes<={human_bytes(room)}"),)


def _checkpointed(prices: PriceTable, space: SearchSpace, room: float, note: Note) -> PriceTable:
    """Return prices with gradient checkpointing if a LoRA of the first ones fits only so."""
    again = prices.with_checkpointing()
    for candidate in space.baselines():
        without, needed = (t.price(candidate).peak_memory_bytes for t in (prices, again))
        if needed <= room < without:
            note(
                f"gradient checkpointing is on: a LoRA needs {human_bytes(without)} without it and "
                f"{human_bytes(needed)} with it, {human_bytes(room)} are free"
            )
            return again
    return prices


def _within(
    prices: PriceTable, space: SearchSpace, room: float | None, data: TaskData | None
) -> PriceTable:
    """Return prices with as large a batch to score as fits: scoring halves one that does not."""
    if room is None or data is None:
        return prices
    reference, least = space.reference(), int(data.validation.lengths.max())
    while prices.price(reference).peak_memory_bytes > room and prices.scoring_tokens > least:
        tokens = max(float(least), prices.scoring_tokens / 2)
        longer = {n: replace(table, scoring_tokens=tokens) for n, table in prices.longer.items()}
        prices = replace(prices, scoring_tokens=tokens, longer=longer)
    return prices


def _workers(
    devices: Devices, share: float, prices: PriceTable, space: SearchSpace, note: Note
) -> tuple[int, float]:
    """Return how many workers devices, or cores and memory, can serve, and a worker's share."""
    peak = max((prices.price(c).peak_memory_bytes for c in space.baselines()), default=0)
    if devices.count:
        wanted = per_device(share)
        fitting = wanted
        while fitting > 1 and (room := devices.room(1 / fitting)) is not None and room < peak:
            fitting -= 1
        if fitting < wanted:
            note(f"memory of a device is free for {fitting} of {wanted} workers")
            share = 1 / fitting
        return devices.workers(share), share
    if devices.cores is not None:
        return devices.cores, 0.0
    feeding, memory = n_parallel_cores(), devices.memory_bytes
    if memory is not None:
        fitting = max(1, int(memory // (WORKER_BYTES + peak)))
        if fitting < feeding:
            note(f"memory is free for {fitting} workers, cores for {feeding}")
        feeding = min(feeding, fitting)
    if feeding < n_cores():
        workers = "1 worker" if feeding == 1 else f"{feeding} workers"
        note(f"{workers} on {n_cores()} cores; --workers overrides")
    return feeding, 0.0
