"""A search that is ready to start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autopeft.costs import PriceTable
from autopeft.costs.constraints import Constraint, limited_costs
from autopeft.costs.objectives import Objective
from autopeft.engine.budget import Budget
from autopeft.engine.evaluate import EVALUATORS
from autopeft.engine.messages import WorkerContext
from autopeft.engine.search_plan import CHOICES, SearchPlan
from autopeft.preparing.memory import within
from autopeft.preparing.pricing import meta_of, prices_of
from autopeft.searcher.space.space import SearchSpace
from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.tasks.data import SplitName, TaskData
from autopeft.tasks.registry import named_task
from autopeft.tasks.summary import DataSummary
from autopeft.training.batching import rung_sample
from autopeft.training.rungs import EARLIEST_STEP, rung_steps
from autopeft.utils.device import kind_of
from autopeft.utils.registry import carried
from autopeft.utils.versions import versions

AUTO_TRIALS_PER_WORKER = {"cpu": 1, "accelerator": 4}
"""Candidates trained together by default. A CPU gains a tenth at 16 rows a step, too little to
propose several at once; on a GPU each worker first measures whether it pays."""


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
        unserved: Roles whose modules the setting `servable` leaves out.
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
    unserved: tuple[str, ...] = ()

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
            prices = prices_of(
                meta, settings, self.data, self.task, source, self.window, self.device
            )
        space = SearchSpace.from_source(
            source,
            prices.topology.without(self.unserved),
            steps=plan.steps,
            batch_size=plan.batch_size,
            servable=settings.servable,
        )
        prices = within(prices, space, self.room, self.data)
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

        "generated" are those of them that text is generated for, if a metric needs it. Splits of
        further tasks are "NAME.validation" and "NAME.test".
        """
        if self.data is None or self.task is None:
            return {}
        found = _rows_of(self.data, self.task, self.settings)
        for second in self.data.second:
            if not second.is_over_base:
                settings, name = second.settings, second.name.split(".")[0]
                own = _rows_of(second.data, named_task(settings), settings)
                found |= {f"{name}.{split}": rows for split, rows in own.items()}
        return found

    @property
    def n_scored(self) -> int:
        """Validation rows that a trial is scored on, those of `data.second` as many as they cost.

        That is told by their tokens. Generating text is measured (`Speed.texts`).
        """
        assert self.data is not None, "a function scores its own rows"
        seconds = [each.data.splits[each.split("validation")] for each in self.data.second]
        own = self.data.validation
        others = sum(int(rows.lengths.sum()) for rows in seconds)
        return len(own) + round(others / float(own.lengths.mean()))

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
            limited=limited_costs(self.constraints, [o.name for o in self.objectives]),
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


def _rows_of(data: TaskData, task: Task, settings: SearchSettings) -> dict[str, Any]:
    """Return the source rows of each split."""
    found: dict[str, Any] = {}
    for name, rows in data.splits.items():
        found[name] = {"source": rows.source, "rows": rows.source_rows.tolist()}
        if task.needs_text() and name != "train":
            sample = rung_sample(len(rows), settings.generation_rows)
            of_text = rows.source_rows if sample is None else rows.source_rows[sample]
            found[name]["generated"] = of_text.tolist()
    return found
