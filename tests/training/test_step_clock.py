"""The clock of a training: its deadline, and what it tells."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from fake_clock import FakeClock

from autopeft.errors import OutOfTime
from autopeft.training import step_clock
from autopeft.training.step_clock import Deadline, StepClock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock().replace_in(monkeypatch, step_clock)


def test_a_deadline_is_sent_as_the_seconds_left(clock: FakeClock) -> None:
    deadline = Deadline(60.0)
    clock.now += 20.0
    sent = pickle.dumps(deadline)
    clock.now = 5.0  # Another machine's.
    received = pickle.loads(sent)
    assert received.seconds_left == 40.0
    clock.now += 50.0
    assert received.seconds_left == -10.0


def test_a_training_ends_after_the_step_that_passes_its_deadline(clock: FakeClock) -> None:
    watch = StepClock(Deadline(10.0))
    clock.now += 10.0
    watch.after_step(1, 0.5)
    clock.now += 1.0
    watch.after_step(2, 0.5, is_last=True)  # It goes on to its scoring.
    with pytest.raises(OutOfTime):
        watch.after_step(2, 0.5)


def test_a_scoring_ends_between_two_batches(clock: FakeClock) -> None:
    model, rows = torch.nn.Linear(1, 1), torch.zeros(1, 1)
    watch = StepClock(Deadline(10.0))
    clock.now += 12.0
    with watch.watching(model, spare=3.0):
        model(rows)
    clock.now += 2.0
    with pytest.raises(OutOfTime), watch.watching(model, spare=3.0):
        model(rows)
    model(rows)  # Nobody watches.


def test_it_tells_every_two_seconds(clock: FakeClock) -> None:
    told: list[tuple[int, float, float | None]] = []
    watch = StepClock(tell=lambda *at: told.append(at))
    for step in range(1, 11):
        clock.now += 0.5
        watch.after_step(step, torch.tensor(1.0 / step))
    clock.now += 3.0
    model = torch.nn.Linear(1, 1)
    with watch.watching(model, step=10):
        model(torch.zeros(1, 1))
        model(torch.zeros(1, 1))
    clock.now += 7.0
    watch.resume(10)
    clock.now += 0.5
    watch.after_step(11, math.nan)
    steps, losses, rates = zip(*told, strict=True)
    assert steps == (4, 8, 10, 11)
    assert losses[:3] == pytest.approx((1 / 4, 1 / 8, 1 / 10))
    assert rates == (2.0, 2.0, None, 2.0)  # The time of the scoring is no step's.
