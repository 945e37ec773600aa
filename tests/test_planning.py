"""A search is fitted to its budget before it starts."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_clock import FakeClock

from autopeft import planning
from autopeft.engine.search_plan import SearchPlan, Speed
from autopeft.errors import SettingsError
from autopeft.planning import check_budget, fitted
from autopeft.preparing.prepare import prepare
from autopeft.session import Session
from autopeft.settings import SearchSettings
from autopeft.workspace import Workspace

_SLOW = Speed(step=0.5, row=0.1, start=0.1, fixed=0.02)


def settings_of(model: Path, data: Path, **changes: Any) -> SearchSettings:
    given = {"backend": "local", "batch_size": 4, "max_length": 16, **changes}
    return SearchSettings(model=str(model), data=str(data), **given)


def test_open_sizes_follow_a_measurement(tiny_model: Path, tiny_data: Path) -> None:
    asked = settings_of(tiny_model, tiny_data, budget="20m", confirm_seeds=2)
    ready = prepare(asked)
    lines: list[str] = []
    planned = fitted(ready, asked, began=time.monotonic(), note=lines.append)
    plan = planned.plan
    assert plan.n_trials > 40
    assert plan.confirm_seeds == 2
    assert plan.open == ("max_finalists", "confirm_share", "rungs")
    assert plan.most_seeds == 2
    assert lines == [plan.line()]
    # Settings, space and rungs follow.
    assert planned.settings.steps == planned.space.reference().train.steps == plan.steps
    assert planned.rungs[-1] == plan.steps
    assert planned.settings.rung_rows == plan.rung_rows
    # A tiny model is fast: it trains longer than usual, as far as its few rows go.
    assert plan.steps > ready.plan.steps or plan.steps == 50


def test_what_a_budget_cannot_pay_is_told_and_tried(
    tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autopeft.planning.measure_speed", lambda *_, **__: (_SLOW, 0.1, "fp32"))
    asked = settings_of(tiny_model, tiny_data, budget="12m", steps=3000)
    lines: list[str] = []
    planned = fitted(prepare(asked), asked, began=time.monotonic(), note=lines.append)
    assert (planned.plan.steps, planned.plan.n_trials) == (3000, 0)
    assert "may not pay for a single trial" in lines[1]
    assert "would pay for 40" in lines[1]


def test_a_budget_that_the_start_has_used_up_is_refused(
    tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings_of(tiny_model, tiny_data, budget="20m")
    ready = prepare(asked)
    clock = FakeClock().replace_in(monkeypatch, planning)

    def slowly(*_: object, **__: object) -> tuple[Speed, float, str]:
        clock.now += 1200
        return _SLOW, 0.1, "fp32"

    monkeypatch.setattr("autopeft.planning.measure_speed", slowly)
    with pytest.raises(SettingsError, match=r"20m.*took 1200 s; use at least \d+m for one trial"):
        fitted(ready, asked, began=clock.monotonic(), note=pytest.fail)


@pytest.mark.parametrize("budget", ["9trials", "1e12flops"])
def test_budgets_without_seconds_keep_the_usual_sizes(
    budget: str, tiny_model: Path, tiny_data: Path
) -> None:
    asked = settings_of(tiny_model, tiny_data, budget=budget, steps=30)
    planned = fitted(prepare(asked), asked, began=time.monotonic(), note=pytest.fail)
    assert planned.plan == SearchPlan.of(asked)
    assert (planned.plan.steps, planned.plan.most_seeds) == (30, 5)
    assert planned.settings.confirm_share == 0.3


def test_a_budget_below_one_lora_is_refused(tiny_model: Path, tiny_data: Path) -> None:
    asked = settings_of(tiny_model, tiny_data, budget="3s")
    with pytest.raises(SettingsError, match="budget='3s': starting up took 60 s"):
        fitted(prepare(asked), asked, began=time.monotonic() - 60, note=pytest.fail)
    asked = settings_of(tiny_model, tiny_data, budget="1flops")
    with pytest.raises(SettingsError, match="the cheapest LoRA trial needs"):
        fitted(prepare(asked), asked, began=time.monotonic(), note=pytest.fail)


def test_a_driver_without_the_device_of_its_workers_measures_nothing(
    tiny_model: Path, tiny_data: Path
) -> None:
    asked = settings_of(tiny_model, tiny_data, budget="20m")
    check_budget(replace(prepare(asked), device="xpu"), asked, spent_seconds=1.0)


def test_a_smaller_batch_that_is_planned_is_priced_told_and_resumed(
    tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings_of(tiny_model, tiny_data, budget="7m", batch_size=None)
    monkeypatch.setattr("autopeft.planning.measure_speed", lambda *_, **__: (_SLOW, 0.1, "fp32"))
    ready, lines = prepare(asked), list[str]()
    planned = fitted(ready, asked, began=time.monotonic(), note=lines.append)
    n_rows = planned.plan.batch_size
    assert ready.plan.batch_size == 16 > n_rows
    assert f"steps of {n_rows} rows" in lines[0]
    assert planned.settings.batch_size == planned.space.reference().train.batch_size == n_rows
    # Resumed, the same settings give the same prices.
    again = prepare(planned.settings)
    assert again.plan.batch_size == n_rows
    candidate = planned.space.baselines()[0]
    assert again.prices.price(candidate) == planned.prices.price(candidate)


def test_what_was_left_open_is_open_when_resumed(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    with workspace.held(is_new=True) as lock:
        session = Session(workspace, lock=lock, began=0.0, is_resumed=True)
    stated = SearchPlan(max_finalists=4, confirm_seeds=2, confirm_share=0.2)
    assert session._reopened(stated) == stated  # A search of an earlier version.
    sizes = ("max_finalists", "confirm_seeds", "confirm_share")
    workspace.remember("plan", replace(stated, open=sizes, n_trials=50))
    assert session._reopened(stated) == replace(stated, open=sizes)
    more = replace(stated, confirm_seeds=4)  # The user's on resume.
    assert session._reopened(more) == replace(more, open=("max_finalists", "confirm_share"))
