"""Measured costs: a third party's beside our own, and meters around the steps of trainings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

import pytest
from restored import restored
from tiny_models import build, candidate_of

import autopeft
from autopeft.costs.objectives import COSTS, Cost
from autopeft.errors import SettingsError
from autopeft.models.attach import attach
from autopeft.plan import AdapterPlan, LayerSpec
from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.tasks.data import TaskData
from autopeft.training import measuring
from autopeft.training.measuring import Metering, Trained, measure_costs, open_meters


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    with restored(COSTS):
        yield


@pytest.fixture
def trained(classification_data: TaskData) -> Trained:
    plan = AdapterPlan([LayerSpec(0, "attn.q", "lora", 2)])
    attached = attach(build("bert"), candidate_of(plan), seed=0)
    given, task = SearchSettings(model="m", data="d"), cast(Task, None)
    return Trained(attached, classification_data, task, given, "cpu", "fp32", 2.5)


def test_a_cost_of_a_third_party_is_measured_as_our_own(trained: Trained) -> None:
    def n_modules(trained: Trained) -> float:
        return float(len(list(trained.model.modules())))

    autopeft.register_cost(Cost("n_modules", measure=n_modules))
    names = ("accuracy", "trainable_params", "n_modules", "train_seconds")
    found = measure_costs(names, trained)
    assert found == {"n_modules": len(list(trained.model.modules())), "train_seconds": 2.5}


@pytest.mark.parametrize("value", [-1.0, float("nan"), "3", None])
def test_what_is_no_cost_is_refused(value: Any, trained: Trained) -> None:
    autopeft.register_cost(Cost("odd", measure=lambda trained: value))
    with pytest.raises(SettingsError, match=r"^cost='odd': ") as caught:
        measure_costs(["odd"], trained)
    assert "\n" not in str(caught.value)


def test_a_meter_counts_only_while_it_runs() -> None:
    count = [0.0]
    metering = Metering({"steps_cost": lambda: count[0]})
    count[0] = 5.0
    with metering.running():
        count[0] = 7.0
    count[0] = 9.0
    with suppress(ZeroDivisionError), metering.running():
        count[0] = 10.0
        raise ZeroDivisionError
    assert metering.risen == {"steps_cost": 3.0}


def test_a_long_training_reads_its_meter_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "READ_EVERY", 0.001)
    reads = [0]

    def read() -> float:
        reads[0] += 1
        return 0.0

    with Metering({"cost": read}).running():
        while reads[0] < 3:
            pass


def test_a_meter_that_is_no_objective_may_be_missing() -> None:
    def none_here(device: str, n_devices: int) -> Any:
        raise SettingsError("objectives", "watts", "this machine has no meter", "leave it out")

    autopeft.register_cost(Cost("watts", meter=none_here))
    autopeft.register_cost(Cost("ticks", meter=lambda device, n_devices: lambda: 1.0))
    opened = open_meters(["accuracy"], "cpu", 1)
    assert "watts" not in opened
    assert opened["ticks"]() == 1.0
    with pytest.raises(SettingsError, match="this machine has no meter"):
        open_meters(["accuracy", "watts"], "cpu", 1)
