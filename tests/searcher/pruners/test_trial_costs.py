"""Prices of trials become costs in one order, whoever names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from autopeft.errors import UserError
from autopeft.searcher.pruners.trial_costs import TrialCosts, computed_price


def costs(names: Sequence[str] | None = None) -> TrialCosts:
    return TrialCosts(names, "price", "set it")


def test_named_costs_keep_their_order() -> None:
    assert costs(["seconds", "bytes"]).of(3, {"bytes": 5, "seconds": 2.0, "watts": 1}) == [2, 5]


def test_without_names_the_first_price_names_them() -> None:
    reader = costs()
    assert reader.of(3, {"seconds": 2.0, "bytes": 5}) == [5.0, 2.0]
    assert reader.names == ("bytes", "seconds")
    with pytest.raises(UserError, match="trial 4 has no cost 'seconds'; set it"):
        reader.of(4, {"bytes": 5})


def test_one_number_is_the_one_cost() -> None:
    assert costs().of(0, 3) == [3.0]
    assert costs(["params"]).of(0, 3) == [3.0]
    with pytest.raises(UserError, match="has no cost 'seconds'"):
        costs(["seconds", "bytes"]).of(0, 3)


def test_a_price_of_autopeft_stands_for_what_is_only_measured() -> None:
    reader = costs(["train_seconds", "rent"])
    assert reader.of(0, {"train_flops": 7.0, "others": {"rent": 2.0}}) == [7.0, 2.0]


def test_no_costs_need_no_price() -> None:
    assert costs([]).of(0, None) == []


def test_a_function_that_fails_is_told_with_the_parameters() -> None:
    assert computed_price(lambda params: params["a"] * 2, 0, {"a": 3}) == 6
    with pytest.raises(UserError, match=r"costs=.'b': 3.: the function fails for trial 7 .KeyErr"):
        computed_price(lambda params: params["a"], 7, {"b": 3})


@pytest.mark.parametrize(
    ("names", "price", "problem"),
    [
        (None, None, "price=None: trial 0 has no costs; set it"),
        (None, {}, "trial 0 has no costs"),
        (["seconds"], {"bytes": 1}, "has no cost 'seconds'"),
        (None, {"seconds": None}, "has no cost 'seconds'"),
        (None, "much", "must be a finite number"),
        (None, {"seconds": "3"}, "must be a finite number"),
        (None, {"seconds": [3]}, "must be a finite number"),
        (None, {"seconds": float("nan")}, "must be a finite number"),
    ],
)
def test_what_is_no_cost_is_refused_in_one_line(names: Any, price: Any, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        costs(names).of(0, price)
    assert "\n" not in str(caught.value)
