"""What every tracker hears: parameters, honest names, and each trial once, also after a resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_samples import OBJECTIVES
from told import COMPLETE, FAILED, PRUNED, STILL_RUNNING, TOLD, result, start, tell_trials

from autopeft.costs.objectives import Objective
from autopeft.integrations.trackers.background import TrackerError
from autopeft.integrations.trackers.base import Tracker, check_answers, front_frame, result_values

INTERRUPTED: Any = "an interrupted result"
ENDED: Any = "a result"


class Memory(Tracker):
    """A store in memory."""

    name = "memory"

    def __init__(self, place: str = "here") -> None:
        self.place = place
        self.runs: dict[int, list[Any]] = {}
        self.states: dict[int, tuple[str, str]] = {}
        self.results: list[Any] = []

    def open(self, search: Any, group: str) -> str:
        self.group = group
        return self.place

    def begin(self, number: int, parameters: Mapping[str, Any]) -> None:
        self.runs[number] = [dict(parameters)]

    def log(self, number: int, values: Mapping[str, float], step: int) -> None:
        self.runs[number].append((step, dict(values)))

    def end(self, number: int, state: str, reason: str) -> None:
        self.states[number] = (state, reason)

    def conclude(self, result: Any) -> None:
        self.results.append(result)


def test_a_run_has_parameters_curve_and_end(tmp_path: Path) -> None:
    tracker = Memory()
    tracker.on_search_begin(start(tmp_path))
    tell_trials(tracker, *TOLD)
    assert tracker.group == "told-1d"
    parameters, *curve, (step, final) = tracker.runs[COMPLETE.number]
    assert parameters["learning_rate"] == COMPLETE.train.learning_rate
    assert parameters["methods"] == "lora"
    assert parameters["n_sites"] == len(COMPLETE.plan.specs)
    assert curve == [(step, {"rung/validation_loss": -score}) for step, score in COMPLETE.rungs]
    assert step == COMPLETE.rungs[-1][0]
    assert final["final/validation_accuracy"] == COMPLETE.values["accuracy"]
    assert final["final/trainable_params"] == COMPLETE.costs.trainable_params
    assert final["final/train_seconds"] == COMPLETE.measured["train_seconds"]
    assert tracker.states == {
        COMPLETE.number: ("complete", ""),
        PRUNED.number: ("pruned", PRUNED.reason),
        FAILED.number: ("failed", FAILED.reason),
    }


@pytest.mark.parametrize(
    ("settings", "direction", "values"),
    [
        ({}, "maximize", {"rung/validation_loss": 0.7}),
        ({}, "minimize", {"rung/validation_loss": -0.7}),
        ({"evaluate": "my:function"}, "maximize", {"rung/quality": -0.7}),
        ({"evaluate": "my:function"}, "minimize", {"rung/quality": -0.7}),
    ],
)
def test_a_rung_is_called_what_it_is(
    settings: dict[str, Any], direction: Any, values: dict[str, float], tmp_path: Path
) -> None:
    objectives = (Objective("quality", direction), *OBJECTIVES[1:])
    tracker = Memory()
    tracker.on_search_begin(replace(start(tmp_path, **settings), objectives=objectives))
    tracker.on_trial_begin(STILL_RUNNING)
    tracker.on_rung(STILL_RUNNING, 9, -0.7)
    tracker.on_rung(STILL_RUNNING, 9, -0.6)  # A function's last report and its result.
    assert tracker.runs[STILL_RUNNING.number][1:] == [(9, values)]


def test_a_resumed_search_writes_what_is_missing(tmp_path: Path) -> None:
    first = Memory()
    first.on_search_begin(start(tmp_path))
    tell_trials(first, COMPLETE)
    first.on_trial_begin(PRUNED)
    first.on_search_end(INTERRUPTED)
    assert first.states[PRUNED.number] == ("failed", "interrupted")
    second = Memory()
    second.on_search_begin(start(tmp_path, COMPLETE, PRUNED, FAILED, is_resumed=True))
    tell_trials(second, STILL_RUNNING)
    assert [*second.runs] == [FAILED.number, STILL_RUNNING.number]
    # Another store has none of them.
    elsewhere = Memory("there")
    elsewhere.on_search_begin(start(tmp_path, *TOLD, is_resumed=True))
    elsewhere.on_search_end(ENDED)
    assert [*elsewhere.states] == [trial.number for trial in TOLD]
    assert elsewhere.results == [ENDED]


def test_the_table_has_test_numbers_and_their_seeds(tmp_path: Path) -> None:
    found = result(tmp_path)
    frame = front_frame(found)
    assert set(frame["seeds"]) == {"", "0, 1, 2"}
    assert len(frame) == len(found.to_pandas())
    assert json.loads(frame.to_json(orient="split"))["columns"][-1] == "seeds"
    values = result_values(found)
    assert values["best/test_accuracy"] == found.best.objectives["accuracy"]
    assert result_values(result(tmp_path, is_complete=False)) == {}
    selected_by = replace(found, view=replace(found.view, is_held_out=False))
    assert "best/validation_accuracy" in result_values(selected_by)


def test_a_server_that_is_not_there_is_told_by_name() -> None:
    with pytest.raises(TrackerError, match=r"nothing answers at http://127.0.0.1:9 \(.*refused"):
        check_answers("http://127.0.0.1:9")
    with pytest.raises(TrackerError, match="nothing answers at nonsense"):
        check_answers("nonsense")
