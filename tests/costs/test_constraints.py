"""Tests of limits on prices."""

from __future__ import annotations

import pytest

from autopeft.costs import Price
from autopeft.costs.constraints import Constraint, parse_constraints
from autopeft.errors import SettingsError


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
        "latency_ms<=3",
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


def test_a_percentage_needs_to_know_of_what() -> None:
    with pytest.raises(SettingsError, match="absolute"):
        Constraint.parse("trainable_params<=1%")


def test_a_price_is_within_or_not() -> None:
    (limit,) = parse_constraints(["trainable_params<=10"])
    assert limit.allows(Price(10, 40, 1.0, 1))
    assert not limit.allows(Price(11, 44, 1.0, 1))
    assert parse_constraints([limit]) == (limit,)
