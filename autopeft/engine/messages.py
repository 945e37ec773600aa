"""Messages between the driver and its workers. Imports no torch."""

from __future__ import annotations

import math
import operator
from asyncio import CancelledError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Literal

from autopeft.confirm.finalists import Compressed, SeedScore
from autopeft.costs import Price, PriceTable
from autopeft.plan import Candidate
from autopeft.training.step_clock import Deadline
from autopeft.trial import RungReport
from autopeft.utils.registry import Carried

if TYPE_CHECKING:
    from autopeft.settings import SearchSettings
    from autopeft.tasks.data import TaskData


JOB_ERRORS = (Exception, SystemExit, GeneratorExit, CancelledError)
"""Out of memory, a diverged loss, a module that rejects its adapter, a mistake in a user's method,
a script of theirs that exits, a task of asyncio's that is canceled: the job fails with its reason,
and the worker with its loaded model lives on."""


@dataclass(frozen=True)
class WorkerContext:
    """What a worker needs to know, sent to it once.

    Attributes:
        data: Encoded splits; flat arrays, shared between the workers of a machine. None if a
            function of the user's trains.
        rungs: Steps at which a search job reports; the last one is its end.
        objectives: Names of the objectives, the quality first.
        limited: Names of measured costs that are no objectives but have a limit.
        device: Type of the workers' device, as torch names it.
        window: Name of the task's window that holds every hidden state the model's head reads; None
            if the head reads all positions, or if that is unknown.
        cache_folder: Folder of the activation cache that the workers of one machine share; the
            driver removes it. None: each worker keeps its cache in memory.
        head_params: Parameters of a new head, as priced; None: not known.
        carried: Methods, tasks and metrics that the driver registered; `make_executor` registers
            them in the worker.
        trials_per_worker: Most jobs that a worker trains together.
        prices: Prices what is trained together, and what a LoRA is cut to; None: nothing is.
        room: Bytes that a worker can allocate on its device; None: not known.
        base_model: Name and revision of the base model, where `settings.model` is a copy of it on
            this machine; None: `settings` say it.
        versions: Packages of the driver; a worker that has others says so.
        is_elastic: Whether all workers are used that a cluster has room for, as nodes join and
            leave.

    Example:
        >>> settings = autopeft.SearchSettings(model="gpt2", data="a.csv", workers=2)
        >>> objectives = ("accuracy", "trainable_params")
        >>> context = autopeft.WorkerContext(settings, None, (10, 30), objectives, "cpu")
        >>> context.settings.workers, context.rungs[-1]
        (2, 30)
    """

    settings: SearchSettings
    data: TaskData | None
    rungs: tuple[int, ...]
    objectives: tuple[str, ...]
    device: str
    window: str | None = None
    cache_folder: str | None = None
    head_params: int | None = None
    carried: Carried | None = None
    trials_per_worker: int = 1
    prices: PriceTable | None = None
    room: float | None = None
    base_model: tuple[str, str | None] | None = None
    is_elastic: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)
    limited: tuple[str, ...] = ()

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of all that is to be told of a training: the objectives, and what has a limit."""
        return (*self.objectives, *self.limited)

    def left_beside(self, candidates: Sequence[Candidate]) -> float:
        """Return the bytes that training candidates together leaves on the device; inf: unknown."""
        if self.prices is None or self.room is None:
            return math.inf
        return self.room - self.prices.pack_bytes(candidates)

    def fits(self, candidates: Sequence[Candidate]) -> bool:
        """Return whether the device holds what training candidates together needs."""
        return self.left_beside(candidates) >= 0


@dataclass(frozen=True)
class Job:
    """One training for a worker.

    Attributes:
        kind: "search" reports at rungs and may be stopped; "confirm" trains to the end, scores the
            test split and returns the adapter.
        costs: What the candidate costs.
        seed: Seeds the initialization and the data order.
        number: The trial's number in the study; -1 for a confirmation.
        compress: Whether a confirmation also scores what it cuts the trained LoRA to.
        cuts: What an earlier seed was cut to: this one is cut to the same ranks. (): the singular
            values of this training decide.
        skipped: Rungs at which the job does not report.
        deadline: When the worker is to stop it between two steps; None: never.
        is_alone: Whether no other job is trained with it: its last worker died.
    """

    kind: Literal["search", "confirm"]
    candidate: Candidate
    costs: Price
    seed: int
    number: int = -1
    compress: bool = False
    cuts: tuple[Candidate, ...] = ()
    skipped: tuple[int, ...] = ()
    deadline: Deadline | None = field(default=None, compare=False)
    is_alone: bool = False

    @property
    def key(self) -> tuple[str, str, int]:
        """Kind, digest and seed: the job's identity."""
        return self.kind, self.candidate.digest, self.seed

    def rungs(self, context: WorkerContext) -> tuple[int, ...]:
        """Return the steps at which a search job reports."""
        return tuple(step for step in context.rungs if step not in self.skipped)


@dataclass(frozen=True)
class Activity:
    """Worker seconds by activity.

    Attributes:
        train: Training steps, compiling included.
        evaluate: Scoring validation and test rows.
        attach: Attaching, detaching and saving adapters.
        cache: Filling the activation cache, which later trials reuse.
    """

    train: float = 0.0
    evaluate: float = 0.0
    attach: float = 0.0
    cache: float = 0.0

    @property
    def total(self) -> float:
        """All seconds."""
        return self.train + self.evaluate + self.attach + self.cache

    def __add__(self, other: Activity) -> Activity:
        return Activity(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: Activity) -> Activity:
        return Activity(*map(operator.sub, astuple(self), astuple(other)))


@dataclass(frozen=True)
class RungMessage:
    """A search job reached a rung.

    Attributes:
        report: The rung's scores.
        is_last: Whether the training has ended.
        measured: Costs and further qualities that are only known by measuring; before the end, the
            qualities that are objectives.
        activity: Seconds since the job's previous message.
        warning: What the user should know, told once.
    """

    report: RungReport
    is_last: bool
    measured: Mapping[str, float] = field(default_factory=dict)
    activity: Activity = field(default_factory=Activity)
    warning: str = ""


@dataclass(frozen=True)
class ConfirmMessage:
    """A confirmation is done; `files` is the adapter, `flops` comes from the job's costs."""

    score: SeedScore
    files: Mapping[str, bytes]
    activity: Activity
    flops: float
    compressed: tuple[Compressed, ...] = ()


@dataclass(frozen=True)
class FailureMessage:
    """A job failed; the worker can run others."""

    reason: str
    activity: Activity = field(default_factory=Activity)


@dataclass(frozen=True)
class TimeUpMessage:
    """The worker stopped a job at its deadline; `flops` are those of all of its steps."""

    step: int
    flops: float
    activity: Activity = field(default_factory=Activity)


Message = RungMessage | ConfirmMessage | FailureMessage | TimeUpMessage


@dataclass(frozen=True)
class StepMessage:
    """How far a running job is. A worker tells it every two seconds and waits for no answer.

    Attributes:
        job: The job's key.
        number: The trial's number; -1 for a confirmation.
        step: Optimizer steps done.
        steps: Steps of the whole training.
        loss: Training loss of the last step; NaN: not known.
        steps_per_second: None while rows are scored.
    """

    job: tuple[str, str, int]
    number: int
    step: int
    steps: int
    loss: float
    steps_per_second: float | None

    @classmethod
    def of(cls, job: Job, step: int, loss: float, steps_per_second: float | None) -> StepMessage:
        """Return how far a job is."""
        steps = job.candidate.train.steps
        return cls(job.key, job.number, step, steps, loss, steps_per_second)


@dataclass(frozen=True)
class BeatMessage:
    """A worker's sign of life, about every two seconds.

    Attributes:
        jobs: Keys of the jobs that it runs.
        cpu_seconds: CPU seconds of its process so far.
        is_starting: Whether it still loads what trains them.
    """

    jobs: tuple[tuple[str, str, int], ...]
    cpu_seconds: float
    is_starting: bool = False


@dataclass(frozen=True)
class HungJob:
    """A job whose worker hangs, and why that is thought."""

    job: Job
    reason: str


OnStep = Callable[[StepMessage], None]


def ignore_step(_step: StepMessage) -> None:
    """Tell nobody."""


def is_final(message: Message) -> bool:
    """Return whether the job sends nothing after this message."""
    return not isinstance(message, RungMessage) or message.is_last
