"""The local backend: the numbers of one Ray worker, and what it does when something goes wrong."""

from __future__ import annotations

import csv
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import autopeft
from autopeft.costs import Price
from autopeft.engine import local_backend
from autopeft.engine.dispatcher import Dispatcher
from autopeft.engine.local_backend import LocalBackend
from autopeft.engine.messages import (
    FailureMessage,
    Job,
    Message,
    OnStep,
    StepMessage,
    WorkerContext,
)
from autopeft.engine.watch import Watch
from autopeft.errors import SettingsError, StorageFailure, TrainingFailure
from autopeft.plan import AdapterPlan, Candidate, TrainSettings
from autopeft.settings import SearchSettings


class FakeDispatcher:
    """Hands out jobs numbered from 0 and notes what comes back."""

    seconds_left = math.inf
    hang_seconds: float | None = None

    def __init__(self, n_jobs: int) -> None:
        plan = Candidate(AdapterPlan(), TrainSettings(1e-3))
        self.jobs = [Job("search", plan, Price(0, 0, 0.0, 0), 0, i) for i in range(n_jobs)]
        self.handed_out = 0
        self.seen: list[tuple[str, int, int]] = []
        self.told: list[StepMessage] = []
        self.in_danger: list[int] = []

    def next_job(self) -> Job | None:
        if self.handed_out == len(self.jobs):
            return None
        self.handed_out += 1
        return self.jobs[self.handed_out - 1]

    def tick(self, steps: Sequence[StepMessage]) -> None:
        self.told.extend(steps)

    def new_watch(self) -> Watch:
        return Watch(self.hang_seconds)

    def say(self, text: str) -> None:
        raise AssertionError(text)

    def may_die(self, jobs: Sequence[Job]) -> None:
        self.in_danger += [job.number for job in jobs]

    def survived(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self.in_danger.remove(job.number)

    def take(self, job: Job, message: Message) -> bool:
        assert isinstance(message, FailureMessage)
        self.seen.append((message.reason, job.number, self.handed_out))
        return False


class FakeExecutor:
    """Raises `errors[number]` for the job of that number."""

    errors: dict[int, BaseException] = {}  # noqa: RUF012
    made: list[FakeExecutor] = []  # noqa: RUF012

    def __init__(self, context: object, on_step: OnStep) -> None:
        self.made.append(self)
        self.on_step = on_step
        self.jobs: Sequence[Job] = ()

    def begin(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs

    def advance(self) -> dict[int, Message]:
        assert torch.get_num_threads() == 1
        if (error := self.errors.get(self.jobs[0].number)) is not None:
            raise error
        self.on_step(StepMessage.of(self.jobs[0], 3, 0.5, 2.0))
        return {0: FailureMessage("diverged")}

    def drop(self, indices: Sequence[int]) -> None:
        assert list(indices) == [0]

    def clear(self) -> None:
        self.jobs = ()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the local backend over fakes."""
    monkeypatch.setattr(local_backend, "make_executor", FakeExecutor)
    FakeExecutor.made = []

    def run(n_jobs: int, errors: dict[int, BaseException]) -> FakeDispatcher:
        FakeExecutor.errors = errors
        dispatcher = FakeDispatcher(n_jobs)
        context = WorkerContext(SearchSettings(), cast(Any, None), (), (), "cpu")
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            with LocalBackend(context) as backend:
                backend.run(cast(Dispatcher, dispatcher))
        finally:
            assert torch.get_num_threads() == 2
            torch.set_num_threads(before)
        return dispatcher

    return run


def test_what_interrupts_is_told_though_the_study_cannot_be_written(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(*_: object) -> None:
        raise StorageFailure("study.db", "database is locked")

    monkeypatch.setattr(FakeDispatcher, "survived", failed)
    with pytest.raises(KeyboardInterrupt):
        run(1, {0: KeyboardInterrupt()})


def test_one_job_waits_while_another_trains(run: Any) -> None:
    assert run(3, {}).seen == [("diverged", 0, 2), ("diverged", 1, 3), ("diverged", 2, 3)]
    assert len(FakeExecutor.made) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        torch.distributed.DistBackendError("NCCL error in: unhandled cuda error"),
    ],
)
def test_a_lost_device_ends_the_search_with_the_line_that_resumes_it(
    run: Any, error: Exception
) -> None:
    with pytest.raises(
        TrainingFailure, match=r"is lost .*`autopeft resume .*--backend ray"
    ) as told:
        run(3, {1: error})
    assert str(error) in str(told.value)
    assert "\n" not in str(told.value)


def test_steps_are_handed_on(run: Any) -> None:
    assert [(at.number, at.step) for at in run(3, {}).told] == [(0, 3), (1, 3), (2, 3)]


def test_a_job_that_breaks_the_worker_fails_alone(run: Any) -> None:
    seen = run(3, {1: TypeError("odd")}).seen
    assert [(what, number) for what, number, _ in seen] == [
        ("diverged", 0),
        ("the worker failed: TypeError: odd", 1),
        ("diverged", 2),
    ]
    assert len(FakeExecutor.made) == 2


@pytest.mark.parametrize("error", [TypeError("odd"), MemoryError(), SystemExit(3)])
def test_the_first_job_may_break_the_worker_too(run: Any, error: BaseException) -> None:
    seen = run(3, {0: error}).seen
    assert [number for _, number, _ in seen] == [0, 1, 2]
    assert seen[0][0].startswith(f"the worker failed: {type(error).__name__}")


def test_a_worker_that_cannot_be_made_ends_the_search(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("weights")

    monkeypatch.setattr(local_backend, "make_executor", fail)
    with pytest.raises(TrainingFailure, match="cannot start: KeyError: 'weights'"):
        run(3, {})


def test_an_interrupt_detaches_and_gets_through(run: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(3, {1: KeyboardInterrupt()})
    assert FakeExecutor.made[0].jobs == ()


class SleepingExecutor(FakeExecutor):
    """Sleeps for ever in the first job."""

    def advance(self) -> dict[int, Message]:
        if self.jobs[0].number == 0:
            time.sleep(1000)
        return super().advance()


@pytest.mark.parametrize(("hang_seconds", "seconds_left"), [(1.0, math.inf), (1.0, 0.5)])
def test_a_job_that_hangs_is_interrupted_and_fails(
    run: Any, monkeypatch: pytest.MonkeyPatch, hang_seconds: float, seconds_left: float
) -> None:
    monkeypatch.setattr(local_backend, "make_executor", SleepingExecutor)
    monkeypatch.setattr(FakeDispatcher, "seconds_left", seconds_left)
    monkeypatch.setattr(FakeDispatcher, "hang_seconds", hang_seconds)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # As in the background of a script.
    try:
        seen = run(2, {}).seen
    finally:
        signal.signal(signal.SIGINT, before)
    assert "no sign of progress for" in seen[0][0]
    assert seen[1][0] == "diverged"


@pytest.mark.parametrize(
    ("name", "value"), [("workers", 2), ("gpus_per_worker", 0.5), ("ray_address", "auto")]
)
def test_settings_of_many_workers_are_refused(name: str, value: object) -> None:
    SearchSettings.from_mapping({name: value})
    with pytest.raises(SettingsError, match=f"^{name}=.*backend=local"):
        SearchSettings.from_mapping({"backend": "local", name: value})


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")  # Ray's own sockets and deprecations.
def test_the_numbers_are_those_of_one_ray_worker(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    found = []
    for backend in ("local", "ray"):
        result = autopeft.search(
            model=str(tiny_model),
            data=str(tiny_data),
            output=str(tmp_path / backend),
            backend=backend,
            workers=1,
            budget="12trials",
            steps=100,
            batch_size=8,
            max_length=16,
            confirm_seeds=1,
            max_finalists=1,
        )
        with (result.folder / "trials.csv").open(newline="") as file:
            trials = [
                {key: value for key, value in row.items() if not key.endswith("_seconds")}
                for row in csv.DictReader(file)
            ]
        found.append((trials, [(entry.digest, entry.objectives) for entry in result.front]))
    assert found[0] == found[1]
    assert len(found[0][0]) == 12
    assert {row["state"] for row in found[0][0]} == {"complete", "pruned"}
