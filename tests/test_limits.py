"""Limits on measured costs in a whole search: measured, kept off the front, picked by."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from searches import SHORT

import autopeft
from autopeft.costs.objectives import COSTS
from autopeft.errors import SettingsError
from autopeft.preparing.prepare import prepare
from autopeft.settings import SearchSettings
from autopeft.training import energy
from autopeft.utils.energy import no_energy

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def _own_costs() -> Iterator[None]:
    before = dict(COSTS._items)
    autopeft.register_cost(
        autopeft.Cost(
            "called_ms",
            unit="ms",
            measure=lambda trained: float(len(trained.candidate.plan.specs)),
            proxy="inference_flops",
        )
    )
    autopeft.register_cost(
        autopeft.Cost(
            "calls_per_second",
            direction="maximize",
            measure=lambda trained: 1000.0 / (1 + len(trained.candidate.plan.specs)),
            proxy="inference_flops",
        )
    )
    yield
    COSTS._items.clear()
    COSTS._items.update(before)


def _asked(model: Path, data: Path, output: Path, **settings: Any) -> dict[str, Any]:
    paths = {"model": str(model), "data": str(data), "output": str(output)}
    return {**SHORT, **paths, "max_length": 16, **settings}


def test_a_search_keeps_limits_on_costs_that_are_no_objectives(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    limits = ["called_ms<=3", "calls_per_second>=150"]
    asked = _asked(tiny_model, tiny_data, tmp_path / "run", constraints=limits, steps=4)
    result = autopeft.search(asked | {"pick": "called_ms<=2ms", "compress": False})
    with (result.folder / "trials.csv").open() as file:
        complete = [row for row in csv.DictReader(file) if row["state"] == "complete"]
    assert {bool(row["broken"]) for row in complete} == {True, False}
    for row in complete:
        n = float(row["measured.called_ms"])
        told = [limits[0]] * (n > 3) + [limits[1]] * (1000 / (1 + n) < 150)
        assert row["broken"].split() == sorted(told)
    front = json.loads((result.folder / "front.json").read_text())
    assert [each["name"] for each in front["objectives"]] == ["accuracy", "trainable_params"]
    assert result.front
    for member in result.front:
        n = len(member.candidate.plan.specs)
        assert member.entry.further["called_ms"] == n <= 3
        assert set(member.objectives) == {"accuracy", "trainable_params"}
    assert result.best is not None
    assert result.best.entry.further["called_ms"] <= 2
    again = autopeft.SearchResult.read(result.folder)
    assert again.pick("calls_per_second>=250").entry.further["calls_per_second"] >= 250
    with pytest.raises(SettingsError, match=r"pick='called_ms<=0.5': no member .* is within it"):
        again.pick("called_ms<=0.5")
    with pytest.raises(SettingsError, match=r"pick='latency_ms<=3': .* did not measure latency_ms"):
        again.pick("latency_ms<=3")


@pytest.mark.nightly
def test_a_function_returns_what_has_a_limit(tiny_model: Path, tmp_path: Path) -> None:
    def evaluate(candidate: autopeft.Candidate, *, seed: int, report: Any) -> Any:
        n = len(candidate.plan.specs)
        return {"accuracy": 0.5 + n / 100, "test_accuracy": 0.5 + n / 100, "called_ms": float(n)}

    asked = _asked(tiny_model, tmp_path, tmp_path / "run", metric="accuracy", evaluate=evaluate)
    del asked["data"], asked["precision"], asked["max_length"], asked["batch_size"]
    result = autopeft.search(asked | {"constraints": ["called_ms<=0.5", "train_seconds<=999"]})
    assert not result.front
    assert all(e.broken == ("called_ms<=0.5",) for e in result.view.dominated_finalists)
    assert "baseline" in result.verdict.text
    assert "called_ms<=0.5, where the best has" in result.verdict.text


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"constraints": ["energy_joules<=9"]}, r"^constraint='energy_joules<=9': no counter here"),
        ({"pick": "called_ms<=9"}, r"^pick='called_ms<=9': called_ms is no cost of this search"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_search(
    settings: dict[str, Any],
    problem: str,
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(*_: Any) -> Any:
        raise no_energy("no counter here")

    monkeypatch.setattr(energy, "PackageEnergy", none)
    asked = _asked(tiny_model, tiny_data, tmp_path / "run", **settings)
    with pytest.raises(SettingsError, match=problem) as told:
        prepare(SearchSettings.from_mapping(asked))
    assert "\n" not in str(told.value)
