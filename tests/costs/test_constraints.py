"""Tests of limits on prices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from autopeft.costs import Price
from autopeft.costs.constraints import (
    Constraint,
    check_limits,
    limited_costs,
    parse_bytes,
    parse_constraints,
)
from autopeft.costs.objectives import objective
from autopeft.errors import SettingsError
from autopeft.settings import SearchSettings


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("trainable_params<=200k", 200_000),
        ("trainable_params < 1.5M", 1_500_000),
        ("trainable_params<=0.1%", 22_700),
        ("adapter_bytes<=1MB", 1_000_000),
        ("adapter_bytes <= 1MiB", 1_048_576),
        ("train_flops<=3e15", 3e15),
        ("peak_memory_bytes<=2GB", 2e9),
    ],
)
def test_constraints_are_read(text: str, limit: float) -> None:
    assert Constraint.parse(text, base_params=22_700_000).limit == pytest.approx(limit)


@pytest.mark.parametrize(
    "text",
    [
        "trainable_params>=5",
        "accuracy<=0.5",
        "latency_ms<=3mm",
        "latency_ms<=0",
        "no_such_ms<=3",
        "trainable_params<=5parsecs",
        "adapter_bytes<=0.1%",
        "trainable_params<=0",
        "trainable_params<=1.2.3",
        "",
    ],
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^constraint="):
        Constraint.parse(text, base_params=1000)


def test_a_size_is_a_text_or_a_number_of_bytes() -> None:
    assert [parse_bytes("size", size) for size in ("5GiB", ".5kb", 500, 2e9)] == [
        5 * 2**30,
        500,
        500,
        2e9,
    ]
    for wrong in ("", "5XB", "0", 0, -1, True, "9" * 400 + "GB", float("nan"), float("inf")):
        with pytest.raises(SettingsError, match=r"^size=.* write e\.g\. 24GB or 80GiB$"):
            parse_bytes("size", wrong)


def test_a_percentage_needs_to_know_of_what() -> None:
    with pytest.raises(SettingsError, match="absolute"):
        Constraint.parse("trainable_params<=1%")


def test_a_price_is_within_or_not() -> None:
    (limit,) = parse_constraints(["trainable_params<=10"])
    assert limit.allows(Price(10, 40, 1.0, 1))
    assert not limit.allows(Price(11, 44, 1.0, 1))
    assert parse_constraints([limit]) == (limit,)


def test_a_quality_that_is_maximized_has_a_lower_limit() -> None:
    (limit,) = parse_constraints(["squad.f1 >= 0.6"])
    assert (limit.name, limit.text, limit.is_measured) == ("squad.f1", "squad.f1>=0.6", True)
    assert limit.allows(Price(10, 40, 1.0, 1))
    assert limit.excess({"squad.f1": 0.5}) == pytest.approx(0.1)
    assert limit.excess({"squad.f1": 0.6}) == 0
    limit.check_direction(objective("squad.f1"))
    with pytest.raises(SettingsError, match=r"squad.loss is minimized, .* use squad.loss<=2"):
        parse_constraints(["squad.loss>=2"])[0].check_direction(objective("squad.loss"))


@pytest.mark.parametrize(
    ("text", "limit", "is_lower"),
    [
        ("serving_latency_ms<=50", 50.0, False),
        ("latency_ms <= 1.5ms", 1.5, False),
        ("train_seconds<90 seconds", 90.0, False),
        ("energy_joules<=2kJ", None, False),
        ("energy_joules<=2k", 2000.0, False),
        ("tokens_per_second >= 20", 20.0, True),
    ],
)
def test_a_limit_on_a_measured_cost(text: str, limit: float | None, is_lower: bool) -> None:
    if limit is None:
        with pytest.raises(SettingsError, match="no such unit 'kj'"):
            Constraint.parse(text)
        return
    found = Constraint.parse(text)
    assert (found.limit, found.is_lower, found.is_measured) == (limit, is_lower, True)
    assert found.measured_cost is not None
    assert " " not in found.text
    price = Price(10, 40, 1.0, 1)
    assert found.allows(price)  # Nobody knows before training.
    assert not found.is_kept(price, {})
    for factor, is_kept in ((0.9, not is_lower), (1.0, True), (1.1, is_lower)):
        assert found.is_kept(price, {found.name: factor * limit}) is is_kept


def test_a_measured_cost_is_limited_where_it_is_worse() -> None:
    with pytest.raises(SettingsError, match=r"use latency_ms<=3"):
        Constraint.parse("latency_ms>=3")
    with pytest.raises(SettingsError, match=r"is maximized, .* use tokens_per_second>=20"):
        Constraint.parse("tokens_per_second<=20")


def test_limited_costs_are_those_that_are_measured_and_no_objectives() -> None:
    texts = ["latency_ms<=3", "forgetting<=1", "trainable_params<=9", "train_seconds<=1"]
    limits = parse_constraints([*texts, "latency_ms<=2"])
    assert limited_costs(limits) == ("latency_ms", "train_seconds")
    assert limited_costs(limits, ["accuracy", "train_seconds"]) == ("latency_ms",)


def test_a_limit_that_cannot_be_measured_is_refused_by_its_own_name() -> None:
    task: Any = SimpleNamespace(name="labels", auto_class="AutoModelForSequenceClassification")
    limits = parse_constraints(["tokens_per_second>=20", "trainable_params<=9"])
    settings = SearchSettings(model="m", data="d")
    with pytest.raises(SettingsError, match=r"^constraint='tokens_per_second>=20': labels") as told:
        check_limits(limits, settings, task, "cpu")
    assert "\n" not in str(told.value)
    check_limits(limits[1:], settings, task, "cpu")


def test_a_lower_limit_on_what_is_minimized_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"forgetting is minimized, .* use forgetting<=0.1"):
        parse_constraints(["forgetting>=0.1"])
    with pytest.raises(SettingsError, match="is a cost, which has an upper limit"):
        parse_constraints(["trainable_params>=10"])


def test_what_is_no_limit_of_a_quality_is_refused_with_an_example_of_one() -> None:
    for text in ("squad.f1", "squad.f1>=abc", "squad.f1>=0.5k", "forgetting<=50m"):
        with pytest.raises(SettingsError, match=r"of a quality squad\.f1>=0\.6"):
            parse_constraints([text])
    with pytest.raises(SettingsError, match=r"use .*, NAME\.METRIC of a further task"):
        parse_constraints(["nonsense<=3"])


def test_a_number_with_a_comma_is_named_where_nothing_splits_it() -> None:
    for text, number in (("trainable_params<=1,000", "1000"), ("forgetting<=0,05", "0.05")):
        with pytest.raises(SettingsError, match=f"a comma separates limits.*write {number}"):
            Constraint.parse(text)
