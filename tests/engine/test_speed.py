"""The speed of this machine is measured before a search, for any task."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pretended_device import NAME, pretended
from task_rows import DATA

from autopeft.engine.messages import WorkerContext
from autopeft.engine.ray_devices import _speed as speed_on_worker
from autopeft.engine.speed import crowding, measure_speed
from autopeft.planning import fitted
from autopeft.preparing.prepare import prepare
from autopeft.preparing.prepared import PreparedSearch
from autopeft.saved_inputs import saved_inputs
from autopeft.settings import SearchSettings
from autopeft.tasks.registry import TASKS
from autopeft.testing.tiny_models import save_model


def prepared(task: str, folder: Path, **more: Any) -> tuple[SearchSettings, PreparedSearch]:
    rows, settings = DATA[task]
    cells = [[row[name] for row in rows] for name in rows[0]]
    model = save_model(TASKS.resolve("task", task).auto_class, cells, folder / "tiny")
    given: dict[str, Any] = {"model": str(model), "data": rows, "task": task, **settings, **more}
    with saved_inputs({**given, "backend": "local", "budget": "9m"}, folder) as plain:
        asked = SearchSettings.from_mapping(plain)
        return asked, prepare(asked)


@pytest.mark.parametrize("task", ["text-classification", "preference", "seq2seq", "embeddings"])
def test_every_task_can_be_measured(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, ready = prepared(task, tmp_path)
    seen: list[Any] = []

    def noted(context: WorkerContext, *rest: Any, **options: Any) -> Any:
        seen.append(measure_speed(context, *rest, **options))
        return seen[0]

    monkeypatch.setattr("autopeft.planning.measure_speed", noted)
    planned = fitted(ready, asked, began=time.monotonic(), note=lambda _: None)
    speed, loading, precision = seen[0]
    numbers = (speed.step, speed.row, speed.start, loading)
    assert all(math.isfinite(number) and number > 0 for number in numbers)
    assert precision in ("fp32", "bf16")
    assert planned.plan.n_trials >= 40


def test_text_that_is_generated_is_timed_for_further_tasks_as_for_the_search(
    tmp_path: Path,
) -> None:
    file = tmp_path / "asked.csv"
    lines = [f"scene {n} was,very {w} so awful" for n, w in enumerate(["poor", "bad"] * 20)]
    file.write_text("\n".join(["prompt,completion", *lines]) + "\n")
    asked = {"name": "asked", "data": str(file), "metric": "token_f1", "generation_rows": 10}
    read = {"name": "read", "data": str(file), "metric": "loss"}
    _, ready = prepared(
        "sft",
        tmp_path,
        metric="exact_match",
        generation_rows=4,
        also=[asked, read],
        objectives=["trainable_params", "asked.token_f1"],
    )
    candidate = ready.space.baselines()[0]
    speed, _, _ = measure_speed(ready.context(), candidate, [candidate], ready.prices)
    assert [(text.n_rows, text.is_at_rungs) for text in speed.texts] == [(4, False), (10, True)]
    # A row of text is several forward passes.
    assert all(text.row > speed.row > 0 for text in speed.texts)


def test_more_workers_than_cores_take_turns() -> None:
    assert crowding(1, 2) == crowding(1, None) == 1.0
    assert crowding(2, 2) == crowding(8, None) == crowding(2, 8)
    assert crowding(8, 2) == 4 * crowding(2, 2)


def test_the_driver_leaves_a_device_to_its_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, ready = prepared("sft", tmp_path)
    # A precision that was measured here would stay.
    settings = replace(ready.settings, backend="ray", gpus_per_worker=2.0, precision="auto")
    there = replace(ready, device=NAME, settings=settings)
    measured: list[Any] = []

    def on_worker(address: str | None, gpus: float, *given: Any) -> Any:
        assert (address, gpus) == (None, 2.0)
        with pretended(2) as world:
            measured.append(speed_on_worker(None, *given))
            assert world.crossings > 0
        return measured[0]

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the driver would open a context of its own")

    monkeypatch.setattr("autopeft.planning.measure_speed", never)
    monkeypatch.setattr("autopeft.engine.ray_devices.speed_there", on_worker)
    planned = fitted(there, asked, began=time.monotonic(), note=lambda _: None)
    speed, loading, precision = measured[0]
    assert min(speed.step, speed.row, speed.start, loading) > 0.0
    assert precision == "bf16"
    assert planned.plan.n_trials is not None
