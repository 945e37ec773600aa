"""Training functions: what they report and return, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autopeft.engine.evaluate import EVALUATORS, TrialReport, parse_result
from autopeft.errors import SettingsError, TrainingFailure


def make_report(sent: list[tuple[int, float]]) -> TrialReport:
    def send(step: int, score: float) -> None:
        sent.append((step, score))

    return TrialReport(rungs=(3, 9), is_confirming=False, folder=Path("."), send=send)


def test_reports_are_numbers_in_order() -> None:
    sent: list[tuple[int, float]] = []
    report = make_report(sent)
    report(3, np.float32(0.5))  # type: ignore[arg-type]
    report(9, 1)
    assert sent == [(3, 0.5), (9, 1.0)]


@pytest.mark.parametrize(
    ("step", "score", "problem"),
    [
        (3, 0.5, "reported step 3 after step 3; report steps in order"),
        (2, 0.5, "reported step 2 after step 3"),
        (3.5, 0.5, "a step is a whole number from 1"),
        ("4", 0.5, "a step is a whole number from 1"),
        (4, float("nan"), "reported nan at step 4; report a finite number"),
        (4, None, "reported None at step 4"),
        (4, True, "reported True at step 4"),
    ],
)
def test_other_reports_are_refused(step: Any, score: Any, problem: str) -> None:
    report = make_report([])
    report(3, 0.4)
    with pytest.raises(TrainingFailure, match=problem):
        report(step, score)


def test_a_result_is_metrics_perhaps_with_rows() -> None:
    assert parse_result({"accuracy": np.float64(0.5), "note": None}, "accuracy") == (
        {"accuracy": 0.5},
        (),
    )
    rows = np.array([1.0, 0.0, 1.0, 0.0])
    found = {"accuracy": 0.9, "test_accuracy": 0.5}
    for same in (rows, rows == 1.0, [True, False, True, False]):
        assert parse_result((found, same), "accuracy") == (found, (1.0, 0.0, 1.0, 0.0))


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (0.9, "evaluate returned float; return metrics by name such as {'accuracy': 0.9}"),
        (None, "evaluate returned NoneType"),
        ({"f1": 0.9}, "evaluate returned f1 without 'accuracy'"),
        ({}, "evaluate returned no metrics without 'accuracy'"),
        ({"accuracy": float("nan")}, "accuracy is nan; return a finite number"),
        ({"accuracy": 0.5, "test_accuracy": None}, "test_accuracy is None"),
        ({"accuracy": np.bool_(True)}, "accuracy is "),
        (({"accuracy": 0.5}, np.array(["1", "0"])), "the quality of row 0 is "),
        (({"accuracy": 0.5}, [1.0, None]), "the quality of row 1 is None"),
        (({"accuracy": 0.9}, [1.0, 0.0]), "the mean of the rows is 0.5, but accuracy is 0.9"),
    ],
)
def test_other_results_are_refused(result: Any, problem: str) -> None:
    with pytest.raises(TrainingFailure) as caught:
        parse_result(result, "accuracy")
    assert problem in str(caught.value)


def test_a_function_takes_seed_and_report() -> None:
    with pytest.raises(SettingsError, match=r"must take \(candidate, \*, seed, report\)"):
        EVALUATORS.text("evaluate", lambda candidate: {})
    with pytest.raises(SettingsError, match="must be a function"):
        EVALUATORS.text("evaluate", 3)
