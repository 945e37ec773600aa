"""Workers that hang, are stopped or die: the trial fails with its reason, the search goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import autopeft
from autopeft.engine import function_executor
from autopeft.errors import TrainingFailure
from autopeft.reporting.trials_csv import read_trials

pytestmark = [pytest.mark.timeout(240), pytest.mark.filterwarnings("default")]

SHORT: dict[str, Any] = {
    "metric": "accuracy",
    "backend": "ray",
    "steps": 9,
    "rungs": 2,
    "confirm_seeds": 1,
    "max_finalists": 1,
}

HARM = {
    "sleeps": lambda: time.sleep(10_000),
    "stops": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def claimed(folder: Path, digest: str, kinds: tuple[str, ...]) -> str | None:
    """What this candidate does: each kind of harm belongs to the first one that claims it."""
    for kind in kinds:
        try:
            with (folder / kind).open("x") as file:
                file.write(digest)
        except FileExistsError:
            pass
        if (folder / kind).read_text() == digest:
            return kind
    return None


def search(tiny_model: Path, tmp_path: Path, kinds: tuple[str, ...], **more: Any) -> Any:
    """A search in which some candidates do harm; each call leaves a line."""
    notes = tmp_path / "notes"
    notes.mkdir()

    def evaluate(candidate: Any, *, seed: int, report: Any) -> dict[str, float]:
        kind = None if report.is_confirming else claimed(notes, candidate.digest, kinds)
        with (notes / "calls").open("a") as file:
            file.write(f"{kind}\n")
        report(report.rungs[0], 0.5)
        if kind is not None:
            HARM[kind]()
        return {"accuracy": 0.5 + 0.01 * len(candidate.plan.specs)}

    output = tmp_path / "run"
    return autopeft.search(
        model=str(tiny_model), evaluate=evaluate, output=output, **{**SHORT, **more}
    )


@pytest.mark.parametrize(
    "kinds",
    [
        ("sleeps", "stops"),
        pytest.param(("sleeps", "stops", "is killed"), marks=pytest.mark.nightly),
    ],
    ids="+".join,
)
def test_the_search_goes_on(kinds: tuple[str, ...], tiny_model: Path, tmp_path: Path) -> None:
    n = len(kinds)
    result = search(
        tiny_model, tmp_path, kinds, budget=f"{n + 2}trials", workers=2, hang_seconds=2.0
    )
    assert result.view.is_complete
    assert result.view.trials == {"complete": 2, "pruned": 0, "failed": n}
    trials = read_trials(result.folder / "trials.csv")
    reasons = [trial.reason for trial in trials if trial.state == "failed"]
    died = "the worker died, perhaps for lack of memory; so did 2 others before"
    assert (died in reasons) == ("is killed" in kinds)
    for reason in set(reasons) - {died}:
        assert reason.startswith("the worker hung and was replaced: no sign of progress for ")
    calls = Counter((tmp_path / "notes" / "calls").read_text().split("\n"))
    expected = {"sleeps": 1, "stops": 1, "is killed": 3}
    assert {kind: calls[kind] for kind in kinds} == {kind: expected[kind] for kind in kinds}


@pytest.mark.nightly
def test_the_budget_ends_a_search_whose_only_worker_hangs(tiny_model: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    result = search(tiny_model, tmp_path, ("sleeps",), budget="20s", workers=1)
    (failed,) = (
        trial for trial in read_trials(result.folder / "trials.csv") if trial.state == "failed"
    )
    assert "when the budget ended" in failed.reason
    assert time.monotonic() - began < 120  # It slept for hours.


@pytest.mark.parametrize("can_leave", [True, False])
def test_in_this_process_a_call_is_interrupted_or_ends_the_search(
    can_leave: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(function_executor, "_SECONDS_TO_LEAVE", 0.5)
    may_end = threading.Event()
    calls: list[Any] = []

    def evaluate(candidate: Any, *, seed: int, report: Any) -> dict[str, float]:
        calls.append(candidate)
        report(report.rungs[0], 0.5)
        while len(calls) == 1 and not may_end.wait(0.01 if can_leave else None):
            pass
        return {"accuracy": 0.5 + 0.01 * len(candidate.plan.specs)}

    output = tmp_path / "run"
    options = {**SHORT, "backend": "local", "budget": "4trials", "hang_seconds": 1.0}
    try:
        if can_leave:
            result = autopeft.search(
                model=str(tiny_model), evaluate=evaluate, output=output, **options
            )
            assert result.view.trials == {"complete": 3, "pruned": 0, "failed": 1}
        else:
            with pytest.raises(TrainingFailure, match="still runs in this process"):
                autopeft.search(model=str(tiny_model), evaluate=evaluate, output=output, **options)
    finally:
        may_end.set()
    failed = [t for t in read_trials(output / "trials.csv") if t.state == "failed"]
    assert "no sign of progress for" in failed[0].reason
    _wait_for_calls()
    again = autopeft.resume(output)
    assert again.view.is_complete
    assert again.view.trials["complete"] == 3


def _wait_for_calls() -> None:
    for thread in threading.enumerate():
        if thread.name == "evaluate":
            thread.join()


DEADLY = """
import os, sys, autopeft
folder, model = sys.argv[1:]

def evaluate(candidate, *, seed, report):
    with open(folder + ".calls", "a") as file:
        print(candidate.digest, report.is_confirming, file=file)
    with open(folder + ".calls") as file:
        first = file.read().split()[0]
    if candidate.digest == first:
        os._exit(9)
    return {"accuracy": 0.5 + 0.01 * len(candidate.plan.specs)}

options = dict(metric="accuracy", backend="local", steps=9, rungs=1, confirm_seeds=1,
    max_finalists=1, budget="4trials")
if os.path.exists(folder):
    autopeft.resume(folder, evaluate=evaluate)
else:
    autopeft.search(model=model, evaluate=evaluate, output=folder, **options)
"""


@pytest.mark.nightly
def test_a_candidate_that_ends_this_process_is_tried_three_times(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", DEADLY, str(folder), str(tiny_model)]
    statuses = [subprocess.run(command, capture_output=True).returncode for _ in range(4)]
    assert statuses == [9, 9, 9, 0]
    (failed,) = (
        trial
        for trial in read_trials(folder / "trials.csv")
        if trial.state == "failed" and trial.reason != "interrupted"
    )
    assert failed.reason.startswith("the process that trained it died 3 times")
    assert autopeft.SearchResult.read(folder).view.trials["complete"] >= 3
