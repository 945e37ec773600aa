"""A training function in its thread: reports, stops, failures, confirmations."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fake_clock import FakeClock

from autopeft.costs import Price
from autopeft.engine.evaluate import EVALUATORS, TrialStopped
from autopeft.engine.function_executor import FunctionExecutor
from autopeft.engine.messages import (
    ConfirmMessage,
    FailureMessage,
    Job,
    RungMessage,
    StepMessage,
    TimeUpMessage,
    WorkerContext,
)
from autopeft.plan import AdapterPlan, Candidate, TrainSettings
from autopeft.settings import SearchSettings
from autopeft.training import step_clock
from autopeft.training.step_clock import Deadline

CANDIDATE = Candidate(AdapterPlan([]), TrainSettings(1e-3, steps=9))
COSTS = Price(0, 0, 900.0, 10, 0.0)


def executor_of(
    function: Callable[..., Any], limited: tuple[str, ...] = (), **settings: Any
) -> FunctionExecutor:
    name = EVALUATORS.text("evaluate", function)
    made = SearchSettings(model="m", evaluate=name, metric="accuracy", **settings)
    objectives = ("accuracy", *made.objectives)
    return FunctionExecutor(WorkerContext(made, None, (3, 9), objectives, "cpu", limited=limited))


def job(kind: Any = "search") -> Job:
    return Job(kind, CANDIDATE, COSTS, seed=5, number=0)


def test_a_trial_reports_and_returns() -> None:
    seen = []

    def evaluate(candidate: Candidate, *, seed: int, report: Any) -> dict[str, float]:
        seen.append((candidate, seed, report.rungs, report.is_confirming))
        report(3, 0.4)
        return {"accuracy": 0.8}

    executor = executor_of(evaluate)
    executor.begin([job()])
    first = executor.advance()[0]
    assert isinstance(first, RungMessage)
    assert (first.report.step, first.report.score, first.is_last) == (3, 0.4, False)
    assert first.report.flops == 300.0
    last = executor.advance()[0]
    assert isinstance(last, RungMessage)
    assert last.is_last
    assert (last.report.step, last.report.metrics) == (9, {"accuracy": 0.8})
    assert last.measured["train_seconds"] > 0
    assert seen == [(CANDIDATE, 5, (3, 9), False)]


def test_a_stopped_trial_ends_before_the_next_begins() -> None:
    ended = threading.Event()

    def evaluate(candidate: Candidate, *, seed: int, report: Any) -> dict[str, float]:
        try:
            for step in range(1, 9):
                report(step, 0.1)
        except TrialStopped:
            ended.set()
            raise
        return {"accuracy": 0.8}

    executor = executor_of(evaluate)
    executor.begin([job()])
    executor.advance()
    executor.drop([0])
    assert ended.is_set()
    executor.begin([job()])
    assert isinstance(executor.advance()[0], RungMessage)
    executor.clear()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda report: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda report: {"f1": 1.0}, "evaluate returned f1 without 'accuracy'; return it, or name"),
        (lambda report: report(0, 1.0), "reported step 0; a step is a whole number from 1"),
        (lambda report: exit(3), "SystemExit: 3"),
    ],
)
def test_what_a_function_raises_is_the_reason(body: Callable[[Any], Any], reason: str) -> None:
    def evaluate(candidate: Candidate, *, seed: int, report: Any) -> Any:
        return body(report)

    executor = executor_of(evaluate)
    executor.begin([job()])
    message = executor.advance()[0]
    assert isinstance(message, FailureMessage)
    assert message.reason.startswith(reason)


def test_a_confirmation_keeps_test_metrics_rows_and_files() -> None:
    def evaluate(candidate: Candidate, *, seed: int, report: Any) -> Any:
        report(3, 0.4)  # Nothing waits for it.
        (report.folder / "deep").mkdir()
        (report.folder / "deep" / "a.bin").write_bytes(b"12")
        return {"accuracy": 0.9, "test_accuracy": 0.5, "test_f1": 0.1}, [1.0, 0.0]

    executor = executor_of(evaluate)
    executor.begin([job("confirm")])
    message = executor.advance()[0]
    assert isinstance(message, ConfirmMessage)
    score = message.score
    assert (score.validation, score.test) == ({"accuracy": 0.9}, {"accuracy": 0.5, "f1": 0.1})
    assert (score.test_rows, score.is_held_out, score.seed) == ((1.0, 0.0), True, 5)
    assert score.objectives == {"accuracy": 0.5, "trainable_params": 0.0}
    assert message.files == {"deep/a.bin": b"12"}


def test_without_test_metrics_a_confirmation_is_not_held_out() -> None:
    def evaluate(candidate: Candidate, *, seed: int, report: Any) -> Any:
        return {"accuracy": 0.9}, [0.8, 1.0]

    executor = executor_of(evaluate, direction="minimize")
    executor.begin([job("confirm")])
    message = executor.advance()[0]
    assert isinstance(message, ConfirmMessage)
    assert not message.score.is_held_out
    assert message.score.test_rows == (-0.8, -1.0)  # Larger is better.


@pytest.mark.parametrize("kind", ["search", "confirm"])
def test_a_function_that_tells_its_steps_is_stopped_at_its_deadline(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    clock = FakeClock().replace_in(monkeypatch, step_clock)
    left, told, threads = [], list[StepMessage](), set[int]()

    def evaluate(candidate: Candidate, *, seed: int, report: Any) -> Any:
        for step in range(1, 10):
            clock.now += 3.0
            left.append(report.seconds_left)
            report.on_step(step, 0.25)
        return {"accuracy": 0.9}

    def on_step(step: StepMessage) -> None:
        told.append(step)
        threads.add(threading.get_ident())

    executor = executor_of(evaluate)
    executor._on_step = on_step
    executor.begin([replace(job(kind), deadline=Deadline(10.0))])
    message = executor.advance()[0]
    assert isinstance(message, TimeUpMessage)
    assert (message.step, message.flops) == (4, 400.0)
    assert left == [7.0, 4.0, 1.0, -2.0]
    assert [(at.step, at.steps, at.loss) for at in told] == [(n, 9, 0.25) for n in range(1, 5)]
    assert threads == {threading.get_ident()}  # A backend's tick must not come from the function's.


def test_a_confirmation_is_stopped_at_a_report_after_its_deadline() -> None:
    def evaluate(candidate: Candidate, *, seed: int, report: Any) -> Any:
        while report.seconds_left > 0:
            pass
        report(3, 0.4)

    executor = executor_of(evaluate)
    executor.begin([replace(job("confirm"), deadline=Deadline(0.01))])
    assert isinstance(executor.advance()[0], TimeUpMessage)


def test_a_measured_cost_must_be_returned() -> None:
    def evaluate(candidate: Candidate, *, seed: int, report: Any) -> Any:
        return {"accuracy": 0.9}

    executor = executor_of(evaluate, objectives=("latency_ms",))
    executor.begin([job()])
    message = executor.advance()[0]
    assert isinstance(message, FailureMessage)
    assert "returned no 'latency_ms'" in message.reason


def test_a_cost_with_a_limit_must_be_returned_and_is_told_beside_the_objectives() -> None:
    returned = {"accuracy": 0.9, "test_accuracy": 0.8}
    executor = executor_of(lambda *_, **__: dict(returned), limited=("latency_ms",))
    executor.begin([job()])
    message = executor.advance()[0]
    assert isinstance(message, FailureMessage)
    assert "returned no 'latency_ms', which has a limit" in message.reason
    returned["latency_ms"] = 3.0
    executor.begin([job("confirm")])
    confirmed = executor.advance()[0]
    assert isinstance(confirmed, ConfirmMessage)
    assert confirmed.score.further == {"latency_ms": 3.0}
    assert "latency_ms" not in confirmed.score.objectives


def test_an_interrupted_search_does_not_wait_for_a_report() -> None:
    between, ended = threading.Event(), threading.Event()

    def evaluate(candidate: Candidate, *, seed: int, report: Any) -> Any:
        report(1, 0.1)
        try:
            between.set()
            while True:
                pass
        finally:
            ended.set()

    executor = executor_of(evaluate)
    executor.begin([job()])
    executor.advance()
    call = executor._call
    assert call is not None
    call._answers.put(None)
    assert between.wait(100)
    executor.clear()
    assert ended.is_set()
