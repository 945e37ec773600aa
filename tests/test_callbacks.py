"""What is shown of a search that runs."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from fake_clock import FakeClock
from report_samples import make_record
from rich.console import Console

from autopeft import callbacks
from autopeft.callbacks import LiveProgress, NotebookProgress, PlainProgress, steps_text, trial_line
from autopeft.costs.objectives import objective
from autopeft.engine.callback import Progress
from autopeft.engine.messages import StepMessage
from autopeft.trial import TIME_UP

AT = StepMessage(("search", "0123456789ab", 0), 7, 31, 75, 0.5204, 2.13)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock().replace_in(monkeypatch, callbacks)


def progress(seconds_left: float, n_confirmed: int = 0, *steps: StepMessage) -> Progress:
    objectives = (objective("accuracy"), objective("trainable_params"))
    counts = {"complete": 3, "pruned": 1, "failed": 0}
    return Progress("search", objectives, counts, None, (), 2, n_confirmed, 0, seconds_left, steps)


def test_how_far_a_job_is_in_a_few_words() -> None:
    assert steps_text(AT) == "trial 7: step 31/75, loss 0.52, 2.1 steps/s"
    confirming = StepMessage(("confirm", "0123456789ab", 2), -1, 75, 75, math.nan, None)
    assert steps_text(confirming) == "confirming 01234567, seed 2: step 75/75, scoring"


def test_a_trial_that_the_budget_ended_says_so() -> None:
    pruned = next(trial for trial in make_record().trials if trial.state == "pruned")
    quality = objective("accuracy")
    assert "budget" not in trial_line(replace(pruned, reason="behind"), quality)
    assert trial_line(replace(pruned, reason=TIME_UP), quality).endswith(f"({TIME_UP})")


def test_the_table_counts_down_between_messages(clock: FakeClock) -> None:
    console = Console(file=io.StringIO(), width=100)
    live = LiveProgress(console)
    live.on_progress(progress(100.0, 0, AT))
    clock.now += 30.0
    console.print(live.render())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1m 10s left" in shown
    assert "trial 7: step 31/75, loss 0.52, 2.1 steps/s" in shown


def test_a_notebook_shows_the_steps() -> None:
    notebook = NotebookProgress()
    notebook._progress = progress(100.0, 0, AT)
    assert "trial 7: step 31/75, loss 0.52, 2.1 steps/s" in notebook._table()


def test_plain_lines_are_rare(clock: FakeClock) -> None:
    file = io.StringIO()
    plain = PlainProgress(file)
    for second in range(40):
        clock.now += 1.0
        plain.on_progress(progress(100.0 - second, 0, AT))
        if second == 20:
            plain.on_message("something else")
    lines = file.getvalue().splitlines()
    assert lines == [
        "search: 3 complete, 1 pruned, 0 failed, 2 running, 1m 25s left; "
        "trial 7: step 31/75, loss 0.52, 2.1 steps/s",
        "something else",
        "search: 3 complete, 1 pruned, 0 failed, 2 running, 1m 04s left; "
        "trial 7: step 31/75, loss 0.52, 2.1 steps/s",
    ]
    clock.now += 6.0
    plain.on_progress(progress(50.0, 1))
    assert len(file.getvalue().splitlines()) == 4  # A confirmation is news.
