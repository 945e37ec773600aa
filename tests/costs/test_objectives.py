"""Costs and qualities by name; a registered cost is an objective and has limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from restored import restored

import autopeft
from autopeft.api import merge_settings
from autopeft.costs import Price
from autopeft.costs.constraints import Constraint
from autopeft.costs.objectives import (
    COSTS,
    Objective,
    by_rank,
    check_leading,
    default_direction,
    find_beside,
    find_cost,
    objective,
    proxy_of,
    with_costs,
)
from autopeft.errors import SettingsError
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.reporting.trials_csv import read_trials, trials_csv
from autopeft.searcher.samplers.cost_model import CostModel

TOPOLOGY = autopeft.Topology(3, {"attn.q": (16, 16), "attn.v": (16, 16)})
PLAN = AdapterPlan([LayerSpec(1, "attn.q", "lora", 2)])
PRICE = Price(64, 256, 1.0, 1)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    with restored(COSTS):
        yield


def depth(price: Any, plan: Any) -> float:
    """The highest adapted layer, which no built-in cost tells."""
    return 1.0 + max((spec.layer for spec in plan.specs), default=-1)


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("accuracy", "maximize"),
        ("loss", "minimize"),
        ("eval_loss", "minimize"),
        ("perplexity", "minimize"),
        ("calibration_error", "minimize"),
        ("mse", "minimize"),
        ("neg_mean_squared_error", "maximize"),
        ("lossless", "maximize"),
    ],
)
def test_the_name_of_a_quality_tells_its_direction(name: str, direction: str) -> None:
    assert default_direction(name) == direction
    assert objective(name).direction == direction


def test_the_built_in_costs_are_registered() -> None:
    assert COSTS.registered[:2] == ("trainable_params", "adapter_bytes")
    assert objective("train_seconds") == COSTS["train_seconds"]
    assert not COSTS["train_seconds"].is_known
    assert COSTS["adapter_bytes"].of(PRICE, PLAN) == 256


def test_a_registered_cost_is_computed_from_price_and_plan() -> None:
    autopeft.register_cost("depth_cost", depth, unit="layers")
    cost = objective("depth_cost")
    assert (cost.direction, cost.unit, cost.is_known) == ("minimize", "layers", True)
    table = autopeft.PriceTable.from_topology(TOPOLOGY)
    candidate = Candidate(PLAN, TrainSettings(1e-3))
    assert with_costs(table, ["trainable_params"]) is table
    price = with_costs(table, ["depth_cost", "adapter_bytes"]).price(candidate)
    assert price.others == {"depth_cost": 2.0}
    assert price.value("depth_cost") == 2.0
    assert price.value("adapter_bytes") == table.price(candidate).adapter_bytes


@pytest.mark.parametrize("sampler", ["autopeft", "tpe"])
def test_a_registered_cost_is_an_objective_with_a_limit(sampler: str, tmp_path: Path) -> None:
    autopeft.register_cost("depth_cost", depth)
    space = autopeft.SearchSpace.from_source({"methods": ["lora", "ia3"]}, TOPOLOGY)
    controller = autopeft.SearchController(
        space, ["accuracy", "depth_cost"], sampler, constraints=["depth_cost<=2"], seed=0
    )
    for number in range(12):
        trial = controller.ask()
        assert trial.costs.others == {"depth_cost": depth(None, trial.plan)}
        controller.report(trial, 5, 0.1 * number)
        controller.tell(trial, score=0.1 * number)
    found = [trial.values.get("depth_cost", 0.0) for trial in controller.trials()]
    assert max(found) == 2.0
    assert [trial.values["depth_cost"] for trial in controller.front()][-1] <= 2.0
    text = trials_csv(controller.trials(), controller.objectives)
    (tmp_path / "trials.csv").write_text(text)
    read = read_trials(tmp_path / "trials.csv")
    assert [trial.costs for trial in read] == [trial.costs for trial in controller.trials()]


@pytest.mark.parametrize("bad", [float("nan"), -1.0, float("inf"), "much", None])
def test_a_cost_must_be_a_number_of_at_least_zero(bad: Any) -> None:
    autopeft.register_cost("bad_cost", lambda price, plan: bad)
    with pytest.raises(SettingsError, match=r"^cost='bad_cost': ") as error:
        COSTS["bad_cost"].of(PRICE, PLAN)
    assert "\n" not in str(error.value)


def test_a_cost_that_was_not_computed_is_told() -> None:
    autopeft.register_cost("depth_cost", depth)
    limit = Constraint.parse("depth_cost<=2")
    assert limit.allows(Price(1, 1, 1.0, 1, others={"depth_cost": 2.0}))
    with pytest.raises(SettingsError, match="depth_cost': this search did not compute it"):
        limit.allows(PRICE)


def test_settings_name_a_cost_by_path_or_give_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_costs.py").write_text("def rent(price, plan): return 3.0\n")
    monkeypatch.chdir(tmp_path)
    settings = autopeft.SearchSettings(objectives=("own_costs:rent",))
    assert find_cost("objectives", settings.objectives[0]).name == "rent"
    assert objective("rent").is_known
    given = merge_settings({"objectives": [lambda price, plan: 1.0, "rent"]}, {})
    assert given.objectives == ("cost", "rent")
    with pytest.raises(SettingsError, match="objectives='rnet': no such cost; did you mean 'rent'"):
        merge_settings({"objectives": ["rnet"]}, {})
    # The pages of a search are written again without what computed its costs.
    assert autopeft.SearchSettings(objectives=("gone:cost",)).objectives == ("gone:cost",)


def test_measured_costs_are_registered_as_a_third_partys_would() -> None:
    cost = autopeft.Cost("swap_ms", measure="package.module:swap_ms", proxy="adapter_bytes")
    assert autopeft.register_cost(cost) is cost
    assert (COSTS["swap_ms"].is_known, COSTS["swap_ms"].is_of_sites) == (False, True)
    assert proxy_of("swap_ms") == "adapter_bytes"
    assert [proxy_of(n) for n in ("adapter_bytes", "accuracy")] == ["adapter_bytes", "accuracy"]
    other = autopeft.Cost("swap_ms", measure="package.module:another")
    with pytest.raises(SettingsError, match="the name is registered twice"):
        autopeft.register_cost(other)


@pytest.mark.parametrize(
    "wrong",
    [
        {"measure": "a:b", "meter": "a:b"},
        {"measure": "a:b", "is_known": True},
        {"function": depth, "is_known": True, "direction": "maximize"},
    ],
)
def test_a_cost_is_known_measured_or_metered(wrong: Any) -> None:
    with pytest.raises(SettingsError, match="must be ") as caught:
        autopeft.register_cost(autopeft.Cost("odd", **wrong))
    assert "\n" not in str(caught.value)


def test_the_cost_that_adapters_are_compared_at_is_minimized() -> None:
    names = ("forgetting", "tokens_per_second", "latency_ms")
    ranked = by_rank(map(find_beside, names))
    assert [o.name for o in ranked] == ["latency_ms", "tokens_per_second", "forgetting"]
    with pytest.raises(SettingsError, match=r"add one, e\.g\. trainable_params,tokens_per_second"):
        by_rank([find_beside("tokens_per_second")])


def test_a_speed_is_maximized_and_predicted(tmp_path: Path) -> None:
    space = autopeft.SearchSpace.from_source({"methods": ["lora", "ia3"]}, TOPOLOGY)
    objectives = ["accuracy", "trainable_params", "tokens_per_second"]
    controller = autopeft.SearchController(space, objectives, seed=0)
    speeds = []
    for number in range(24):
        trial = controller.ask()
        speeds.append(1000.0 / (10.0 + len(trial.plan.specs)))
        controller.report(trial, 30, 0.01 * number)
        controller.tell(trial, score=0.5, measured={"tokens_per_second": speeds[-1]})
    front = controller.front()
    # Of equal quality and size, the fastest is left.
    assert max(t.values["tokens_per_second"] for t in front) == max(speeds)
    model = CostModel(space, controller.objectives, autopeft.PriceTable.from_topology(TOPOLOGY))
    model.fit(controller.trials())
    few, many = space.baselines()[0], space.baselines()[-1]
    logs = model.predict([space.encoder.point_of(each) for each in (few, many)])[:, 1]
    expected = [(10.0 + len(each.plan.specs)) / 1000.0 for each in (few, many)]
    assert np.exp(logs) == pytest.approx(expected, rel=0.05)


def test_what_leads_a_search_is_a_quality() -> None:
    """Regression: the score was the value of the cost (issue 18)."""
    check_leading("objectives", Objective("accuracy", "maximize"))
    for name in ("trainable_params", "train_seconds", "inference_flops"):
        with pytest.raises(SettingsError, match=f"metric='{name}': is a cost"):
            check_leading("metric", Objective(name, "minimize"))
    with pytest.raises(
        SettingsError, match=r"name a quality first, e.g. accuracy,trainable_params"
    ):
        check_leading("objectives", objective("trainable_params"))
