"""Measures, before a search, how fast a worker trains and scores on this machine."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopeft.costs import PriceTable
from autopeft.engine.executor import Executor
from autopeft.engine.messages import JOB_ERRORS, FailureMessage, Job, RungMessage, WorkerContext
from autopeft.engine.search_plan import Speed, TextSpeed
from autopeft.errors import TrainingFailure
from autopeft.models.attach import attach
from autopeft.plan import Candidate
from autopeft.tasks.data import SplitName, TaskData
from autopeft.training.batching import padded_tokens
from autopeft.training.evaluation import evaluate, token_budget
from autopeft.training.precision import Precision
from autopeft.training.second_scores import SecondScore
from autopeft.training.setup import TrainingSetup
from autopeft.utils.formatting import one_line
from autopeft.utils.hardware import n_cores, one_thread
from autopeft.utils.quiet import quiet_transformers

_RUNGS = (1, 2, 3, 5, 7, 9)
"""Steps at which the clock is read."""

_ENOUGH_SECONDS = 3.0
_N_SCORED = 32
_FEW_TEXTS, _QUICK_SECONDS = 4, 1.0
"""Rows that text is generated for at first, and seconds below which it is for `_N_SCORED` rows."""

_SHARED = 1.25
"""Workers on one machine share its memory's bandwidth."""


def measure_speed(
    context: WorkerContext,
    measured: Candidate,
    average: Sequence[Candidate],
    prices: PriceTable,
    *,
    n_workers: int = 1,
    few_rows: int | None = None,
) -> tuple[Speed, float, Precision]:
    """Train a candidate for a few steps, in this process with one thread, as a worker does.

    Args:
        context: What the workers will be told.
        measured: The candidate.
        average: Candidates like those of the search: an average step is the measured one, scaled
            by their FLOPs.
        prices: Prices them.
        n_workers: Workers that will train at once on this machine.
        few_rows: A step of so few rows is timed as well, to know what does not depend on them.
            None: it is not.

    Returns:
        The speed, the seconds that loading the model took, and the precision of the trainings.

    Raises:
        TrainingFailure: if the candidate cannot be trained.
    """
    data = context.data
    assert data is not None, "functions are not measured"
    n_train = 8 * measured.train.batch_size
    few = _first(data, n_train)
    settings = replace(
        context.settings, rung_rows=_N_SCORED, activation_cache=False, torch_compile=False
    )
    context = replace(context, data=few, settings=settings, rungs=(*_RUNGS, 10**6))
    jobs = [_job(measured, prices, context)]
    if few_rows is not None and few_rows < measured.train.batch_size:
        smaller = replace(measured, train=replace(measured.train, batch_size=few_rows))
        jobs.append(_job(smaller, prices, context))
    with warnings.catch_warnings(), quiet_transformers(), one_thread(context.device):
        warnings.simplefilter("ignore")
        began = time.perf_counter()
        executor = Executor(context)
        loading = time.perf_counter() - began
        found = [_timed(executor, job, n_rows=len(few.validation)) for job in jobs]
        texts = _texts(executor, measured, data)
    flops = [prices.price(candidate).train_flops for candidate in average]
    share = float(np.mean(flops)) / jobs[0].costs.train_flops if flops else 1.0
    is_elsewhere = settings.ray_address is not None or context.device != "cpu"
    crowd = crowding(n_workers, None if is_elsewhere else n_cores())
    # Few rows are of many lengths, so they are padded more than all of them are.
    budget = token_budget(context.device, prices.vocabulary)
    padded = [padded_tokens(rows.validation.lengths, budget) for rows in (data, few)]
    first = found[0]
    row = crowd * first.row * padded[0] / padded[1]
    # What is no arithmetic (attaching, Python) does not shrink with the candidate.
    step = crowd * first.step * max(0.5, min(share, 2.0))
    fixed = 0.0
    if few_rows is not None and len(found) > 1:
        ratio = few_rows / measured.train.batch_size
        fixed = (found[1].step - ratio * first.step) / (1.0 - ratio)
        fixed = max(0.0, min(crowd * fixed, step))
    texts = tuple(replace(text, row=crowd * text.row) for text in texts)
    speed = Speed(step, row, crowd * first.start, fixed, texts)
    return speed, loading, executor.setup.precision


def _job(candidate: Candidate, prices: PriceTable, context: WorkerContext) -> Job:
    return Job("search", candidate, prices.price(candidate), context.settings.seed)


def crowding(n_workers: int, n_cores: int | None) -> float:
    """Return how many times as long a step of one worker takes with all of them at work.

    Args:
        n_workers: Workers, with a thread each.
        n_cores: Cores that they share; None: each has its own device.
    """
    turns = 1.0 if n_cores is None else max(1.0, n_workers / n_cores)
    return turns * (_SHARED if n_workers > 1 else 1.0)


def _timed(executor: Executor, job: Job, *, n_rows: int) -> Speed:
    """Train from one rung to the next; the medians count, for the machine may be busy with others.

    The first step also loads libraries and allocates.
    """
    executor.begin([job])
    try:
        return _timed_rungs(executor, n_rows=n_rows)
    finally:
        executor.clear()


def _timed_rungs(executor: Executor, *, n_rows: int) -> Speed:
    steps, rows, start, before = [], [], 0.0, 0
    began = time.perf_counter()
    for rung in _RUNGS:
        message = executor.advance()[0]
        if isinstance(message, FailureMessage):
            raise TrainingFailure(message.reason)
        assert isinstance(message, RungMessage), "no confirmation was asked for"
        spent = message.activity
        if before == 0:
            start = spent.attach
        else:
            steps.append(spent.train / (rung - before))
            rows.append(spent.evaluate / n_rows)
        before = rung
        if steps and time.perf_counter() - began > _ENOUGH_SECONDS:
            break
    return Speed(statistics.median(steps), statistics.median(rows), start)


def _first(data: TaskData, n_train: int) -> TaskData:
    """Return the first rows of each split, without further tasks."""
    splits = {
        name: split.first(n_train if name == "train" else _N_SCORED)
        for name, split in data.splits.items()
    }
    return replace(data, splits=splits, second=())


@dataclass(frozen=True)
class _Written:
    """A split that text is generated for: a few rows, and how many there are."""

    setup: TrainingSetup
    split: SplitName
    n_rows: int
    is_at_rungs: bool


def _texts(executor: Executor, candidate: Candidate, data: TaskData) -> tuple[TextSpeed, ...]:
    """Time the generation of text with a candidate attached, for each task whose metric needs it.

    Raises:
        TrainingFailure: if it fails.
    """
    try:
        written = list(_written(executor, data))
        if not written:
            return ()
        attached = attach(executor.backbone, candidate, seed=0)
        try:
            return tuple(
                TextSpeed(_row_seconds(executor, each), each.n_rows, each.is_at_rungs)
                for each in written
            )
        finally:
            attached.detach()
    except JOB_ERRORS as error:
        raise TrainingFailure(one_line(error)) from error


def _written(executor: Executor, data: TaskData) -> Iterator[_Written]:
    setup, context = executor.setup, executor.context
    if setup.task.needs_text():
        n_rows = min(len(data.validation), setup.task.settings.generation_rows)
        yield _Written(setup, "validation", n_rows, is_at_rungs=False)
    for second in data.second:
        if second.is_over_base:
            continue  # A loss; making it ready would score all of its rows.
        split = second.split("validation")
        few = replace(second, data=_first(second.data, 0))
        score = SecondScore.of(
            few, executor.backbone.model, context.device, executor.test_precision
        )
        if score.has_text:
            n_rows = min(len(second.data.splits[split]), second.settings.generation_rows)
            yield _Written(score.setup, split, n_rows, second.name in context.objectives)


def _row_seconds(executor: Executor, written: _Written) -> float:
    """Return what the text of a row takes beyond reading it."""
    for n in (_FEW_TEXTS, _N_SCORED):
        rows = np.arange(min(n, written.n_rows), dtype=np.int64)
        seconds = []
        for with_text in (False, True):
            began = time.perf_counter()
            model, split = executor.backbone.model, written.split
            evaluate(model, written.setup, split, rows=rows, with_text=with_text)
            seconds.append(time.perf_counter() - began)
        if len(rows) < n or seconds[1] > _QUICK_SECONDS:
            break
    return max(0.0, seconds[1] - seconds[0]) / len(rows)
