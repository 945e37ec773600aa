"""A trial's costs are read from its user attribute, or computed from its parameters."""

from __future__ import annotations

from typing import Any

import pytest
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial, create_trial

from autopeft.errors import UserError
from autopeft.searcher.pruners.trial_costs import TrialCosts


def trial(price: Any = None, **params: int) -> FrozenTrial:
    attributes = {} if price is None else {"price": price}
    distributions: dict[str, Any] = {name: IntDistribution(0, 99) for name in params}
    return create_trial(
        value=0.0, user_attrs=attributes, params=params, distributions=distributions
    )


def test_named_costs_keep_their_order() -> None:
    costs = TrialCosts(["seconds", "bytes"])
    assert costs.of(trial({"bytes": 5, "seconds": 2.0, "watts": 1})) == [2.0, 5.0]


def test_without_names_the_first_price_names_them() -> None:
    costs = TrialCosts()
    assert costs.of(trial({"seconds": 2.0, "bytes": 5})) == [5.0, 2.0]
    assert costs.names == ("bytes", "seconds")
    with pytest.raises(UserError, match="has no cost 'seconds'"):
        costs.of(trial({"bytes": 5}))


def test_one_number_is_the_one_cost() -> None:
    assert TrialCosts().of(trial(3)) == [3.0]
    assert TrialCosts(["params"]).of(trial(3)) == [3.0]
    with pytest.raises(UserError, match="has no cost 'seconds'"):
        TrialCosts(["seconds", "bytes"]).of(trial(3))


def test_a_price_of_autopeft_stands_for_what_is_only_measured() -> None:
    costs = TrialCosts(["train_seconds", "rent"])
    assert costs.of(trial({"train_flops": 7.0, "others": {"rent": 2.0}})) == [7.0, 2.0]


def test_a_function_computes_them() -> None:
    assert TrialCosts(function=lambda p: p["a"] * p["b"]).of(trial(a=3, b=4)) == [12.0]
    assert TrialCosts(function=lambda p: {"x": p["a"], "y": 1.0}).of(trial(a=3)) == [3.0, 1.0]


def test_no_costs_need_no_price() -> None:
    assert TrialCosts([]).of(trial()) == []


@pytest.mark.parametrize(
    ("costs", "price", "problem"),
    [
        (TrialCosts(), None, "trial -1 has no costs; set it before the first report"),
        (TrialCosts(["seconds"]), {"bytes": 1}, "has no cost 'seconds'"),
        (TrialCosts(), "much", "must be a finite number"),
        (TrialCosts(), {"seconds": "3"}, "must be a finite number"),
        (TrialCosts(), {"seconds": float("nan")}, "must be a finite number"),
        (TrialCosts(), {"seconds": None}, "has no cost 'seconds'"),
        (TrialCosts(), {}, "trial -1 has no costs"),
        (TrialCosts(function=lambda p: p["a"]), None, r"the function fails .*KeyError: 'a'"),
        (TrialCosts(function=lambda p: None), None, "costs=None: the function returns none"),
    ],
)
def test_what_is_no_cost_is_refused_in_one_line(
    costs: TrialCosts, price: Any, problem: str
) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        costs.of(trial(price))
    assert "\n" not in str(caught.value)
