"""A part of the user's that fails while a search runs: one line, and the search can be resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import autopeft
from autopeft import methods
from autopeft.costs.objectives import Cost
from autopeft.costs.price import Price
from autopeft.errors import SettingsError, SpaceError
from autopeft.methods.base import Method
from autopeft.methods.registry import METHODS
from autopeft.plan import AdapterPlan


class Pruner:
    def prune(self, study: Any, trial: Any) -> bool:
        raise ValueError("boom")


class Sampler:
    def propose(self, trials: Any) -> Any:
        raise ValueError("boom")


class Raises(autopeft.Backend):
    def __init__(self, context: autopeft.WorkerContext) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, dispatcher: autopeft.Dispatcher) -> None:
        raise ValueError("boom")


class Returns(Raises):
    def run(self, dispatcher: autopeft.Dispatcher) -> None:
        pass


def evaluate(candidate: Any, *, seed: int, report: Any) -> dict[str, float]:
    for step in report.rungs:
        report(step, 0.5)
    return {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ({"pruner": Pruner()}, r"^pruner=.*Pruner.*prune fails \(ValueError: boom\); correct it$"),
        ({"sampler": Sampler()}, r"^sampler=.*propose fails \(ValueError: boom\); correct it$"),
        ({"backend": Raises}, r"^backend=.*Raises.*fails \(ValueError: boom\); correct it$"),
        ({"backend": Returns}, r"^backend=.*run returned in the phase 'search'"),
    ],
)
def test_it_is_named_and_the_folder_stays(
    part: dict[str, Any], problem: str, tiny_model: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "metric": "accuracy",
        "backend": "local",
        "budget": "30trials",
        "steps": 9,
        "rungs": 2,
        **part,
    }
    with pytest.raises(SettingsError, match=problem):
        autopeft.search(
            model=str(tiny_model), evaluate=evaluate, output=tmp_path / "run", **settings
        )
    assert not autopeft.SearchResult.read(tmp_path / "run").view.is_complete


def test_text_is_no_cost() -> None:
    text: Any = lambda price, plan: "5"  # noqa: E731
    cost = Cost("mine", "minimize", is_known=True, function=text)
    with pytest.raises(SettingsError, match=r"cost='mine': .* it returns '5', not a number"):
        cost.of(Price(0, 0, 0.0, 0), AdapterPlan())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"learning_rate": ("a", "b")}, r"learning_rate=\('a', 'b'\)"),
        ({"roles": "mlp.up"}, "roles='mlp.up', but it must be a tuple of str"),
        ({"n_params": lambda *_: -1}, "n_params that returns -1"),
        ({"n_params": lambda *_: 1 / 0}, "n_params that fails .ZeroDivisionError"),
        ({"flops": lambda *_: 2.0}, "flops that returns 2.0, but it must be an AdapterFlops"),
    ],
)
def test_a_method_with_a_mistake_is_refused_when_it_is_registered(
    change: dict[str, Any], problem: str
) -> None:
    fields = {k: v for k, v in change.items() if not callable(v)}
    broken: Method = replace(methods.get("lora"), name="broken", **fields)
    for name, function in change.items():
        if callable(function):
            object.__setattr__(broken, name, function)
    with pytest.raises(SpaceError, match=f"method='broken': has .*{problem}"):
        autopeft.register_method(broken)
    assert "broken" not in METHODS
