"""Who hangs and who is slow: no false alarm, whatever the load, and an end in any case."""

from __future__ import annotations

import pytest
from fake_clock import FakeClock

from autopeft.engine import watch
from autopeft.engine.watch import Watch


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock().replace_in(monkeypatch, watch)


def passes(clock: FakeClock, watched: Watch, seconds: float) -> None:
    """Let time pass for somebody who looks every second."""
    for _ in range(int(seconds)):
        clock.now += 1.0
        watched.problem("job")
    clock.now += seconds % 1.0


class Worker:
    """A worker under a watch; `share` of a core is what it gets."""

    def __init__(
        self, clock: FakeClock, hang_seconds: float | None = None, budget: float | None = None
    ) -> None:
        self.clock, self.cpu = clock, 0.0
        self.watch = Watch(hang_seconds, budget)
        self.watch.beat("job", 0.0)

    def wait(self, seconds: float, share: float = 0.0) -> None:
        passes(self.clock, self.watch, seconds)
        self.cpu += seconds * share
        self.watch.beat("job", self.cpu)

    def step(self, seconds: float, share: float = 1.0) -> None:
        self.wait(seconds, share)
        assert self.watch.problem("job") is None
        self.watch.sign("job")


def test_one_that_sleeps_hangs_after_the_seconds_allowed(clock: FakeClock) -> None:
    worker = Worker(clock, 30.0)
    worker.step(1.0)
    worker.wait(29.0)
    assert worker.watch.problem("job") is None
    worker.wait(2.0)
    assert worker.watch.problem("job") == "no sign of progress for 31 s"


def test_one_without_beats_is_asleep(clock: FakeClock) -> None:
    """A process that was stopped tells nothing, not even of its CPU time."""
    worker = Worker(clock, 30.0)
    worker.step(1.0)
    passes(clock, worker.watch, 31.0)
    assert worker.watch.problem("job") is not None


def test_a_load_of_eight_is_no_alarm(clock: FakeClock) -> None:
    worker = Worker(clock, None, 80.0)
    for _ in range(5):
        worker.step(3.0)
    for _ in range(5):
        worker.step(8 * 3.0, share=1 / 8)
    worker.wait(8 * 20.0, share=1 / 8)
    assert worker.watch.problem("job") is None


def test_slow_steps_are_no_alarm(clock: FakeClock) -> None:
    worker = Worker(clock, 30.0)
    worker.step(25.0, share=0.0)
    worker.wait(8 * 25.0)
    assert worker.watch.problem("job") is None


def test_one_that_turns_in_circles_hangs_too(clock: FakeClock) -> None:
    worker = Worker(clock, 30.0)
    worker.wait(299.0, share=1.0)
    assert worker.watch.problem("job") is None
    worker.wait(2.0, share=1.0)
    assert worker.watch.problem("job") is not None


def test_who_loads_a_model_has_more_time(clock: FakeClock) -> None:
    worker = Worker(clock, 30.0)
    worker.watch.begin("job", is_starting=True)
    worker.watch.beat("job", 0.0, is_starting=True)
    passes(clock, worker.watch, 119.0)
    assert worker.watch.problem("job") is None
    passes(clock, worker.watch, 2.0)
    assert "while it loaded the model" in str(worker.watch.problem("job"))


@pytest.mark.parametrize(("share", "seconds"), [(0.0, 16.0), (1.0, 31.0)])
def test_when_the_time_is_up_little_silence_is_allowed(
    clock: FakeClock, share: float, seconds: float
) -> None:
    worker = Worker(clock, None, 60.0)
    worker.step(1.0)
    worker.wait(seconds - 2.0, share)
    assert worker.watch.problem("job", is_over=True) is None
    worker.wait(3.0, share)
    assert "when the budget ended" in str(worker.watch.problem("job", is_over=True))


def test_nothing_is_known_of_a_function_before_it_has_ended_once(clock: FakeClock) -> None:
    known = Watch(None, 400.0, is_function=True)
    known.beat("job", 0.0)
    passes(clock, known, 10_000.0)
    assert known.problem("job") is None
    assert known.problem("job", is_over=True) is not None
    known.begin("job")
    passes(clock, known, 100.0)
    known.sign("job")
    passes(clock, known, 1_000.0)
    assert known.problem("job") is None
    passes(clock, known, 30_000.0)
    assert known.problem("job") is not None


def test_while_the_driver_waited_for_a_database_nobody_was_silent(clock: FakeClock) -> None:
    worker = Worker(clock, 30.0)
    clock.now += 70.0  # Nobody looked meanwhile.
    assert worker.watch.problem("job") is None
    worker.wait(30.0)
    assert worker.watch.problem("job") is not None


def test_what_has_ended_is_not_watched(clock: FakeClock) -> None:
    worker = Worker(clock, 30.0)
    worker.watch.end("job")
    passes(clock, worker.watch, 1000.0)
    assert worker.watch.problem("job") is None


def test_a_search_that_was_stopped_itself_raises_no_alarm(clock: FakeClock) -> None:
    worker = Worker(clock, 30.0)
    worker.step(1.0)
    clock.now += 3600.0  # Ctrl-Z
    assert worker.watch.problem("job") is None
