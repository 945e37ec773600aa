"""Numbers for people."""

from __future__ import annotations

import math

import pytest

from autopeft.utils.formatting import (
    human_bytes,
    human_count,
    human_seconds,
    human_value,
    middle_cut,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.9, "1k"),
        (17282, "17.3k"),
        (22_700_000, "22.7M"),
        (4.2e14, "420T"),
    ],
)
def test_counts(value: float, text: str) -> None:
    assert human_count(value) == text


def test_units() -> None:
    assert human_bytes(1536) == "1.5 KiB"
    assert human_bytes(12) == "12 B"
    assert human_seconds(9.94) == "9.9s"
    assert human_seconds(9.97) == "10s"
    assert human_seconds(75.2) == "1m 15s"
    assert human_seconds(3599.7) == "1h 00m"
    assert human_value(0.82349, "") == "0.823"
    assert human_value(12.345, "ms") == "12.3 ms"
    assert human_value(19976, "bytes") == "19.5 KiB"
    for unit in ("", "ms", "bytes", "seconds", "parameters"):
        assert human_value(math.nan, unit) == "-"


def test_long_text_loses_its_middle_and_says_how_much() -> None:
    assert middle_cut("a" * 12, 10) == "a" * 12
    assert middle_cut("a" * 10 + "b" * 10, 10) == "aaaaa [10 characters] bbbbb"
