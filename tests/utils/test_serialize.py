"""One serializer: dataclasses to plain values and back, each mistake named with its path."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import pytest
import torch

from autopeft.errors import AdapterError, DataError, SettingsError, SpaceError, StorageError
from autopeft.utils.serialize import finite, from_plain, read_json, strict_json, to_float, to_plain


@dataclass(frozen=True)
class Part:
    size: int
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 0:
            raise SpaceError("size", self.size, "must be positive", "use 1")


@dataclass(frozen=True)
class Whole:
    name: str
    parts: tuple[Part, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    limit: float | None = None
    source: str | Mapping[str, Any] = "here"

    @cached_property
    def digest(self) -> str:
        return "computed"


def test_a_dataclass_survives() -> None:
    whole = Whole("w", (Part(1), Part(2, 0.1)), MappingProxyType({"loss": 0.1}), 1e16)
    assert whole.digest  # what is cached is not part of the value
    plain = to_plain(whole)
    assert list(plain) == ["name", "parts", "scores", "limit", "source"]
    assert from_plain(Whole, json.loads(json.dumps(plain))) == whole


def test_numpy_scalars_are_plain_numbers() -> None:
    plain = to_plain(Whole("w", (Part(cast(int, np.int64(3))),), {"loss": np.float64(0.25)}))
    assert json.dumps(plain["parts"]) == '[{"size": 3, "share": 0.5}]'
    assert type(plain["scores"]["loss"]) is float


def test_finished_values_may_be_among_plain_ones() -> None:
    part = Part(3)
    assert from_plain(Whole, {"name": "w", "parts": [part, {"size": 4}]}).parts[0] is part


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "whole=[]: must be a mapping; fix it"),
        ({}, "whole={}: lacks the key `name`; fix it"),
        ({"name": 3}, "whole.name=3: must be text; fix it"),
        ({"name": None}, "whole.name=None: must be text; fix it"),
        ({"name": "w", "nane": 1}, "whole.nane=1: unknown key; did you mean 'name'?"),
        (
            {"name": "w", "zzz": 1},
            "whole.zzz=1: unknown key; use one of name, parts, scores, limit, source",
        ),
        ({"name": "w", "limit": "much"}, "whole.limit='much': must be a number; fix it"),
        ({"name": "w", "source": 1}, "whole.source=1: must be text or a mapping; fix it"),
        ({"name": "w", "parts": "ab"}, "whole.parts='ab': must be a list; fix it"),
        (
            {"name": "w", "parts": [{"size": 1}, {"size": True}]},
            "whole.parts[1].size=True: must be a whole number; fix it",
        ),
        (
            {"name": "w", "parts": [{"size": 1.5}]},
            "whole.parts[0].size=1.5: must be a whole number; fix it",
        ),
        (
            {"name": "w", "parts": [{"size": 1}, {"size": 1, "sise": 2}]},
            "whole.parts[1].sise=2: unknown key; did you mean 'size'?",
        ),
        ({"name": "w", "scores": {3: 1.0}}, "whole.scores={3: 1.0}: a key must be text; fix it"),
        (
            {"name": "w", "scores": MappingProxyType({"a": 1, "attn.q": "b"})},
            "whole.scores.attn.q='b': must be a number; fix it",
        ),
    ],
)
def test_a_mistake_names_field_value_problem_and_remedy(data: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        from_plain(Whole, data, field="whole", remedy="fix it", error=DataError)
    assert str(caught.value) == message


def test_a_mistake_in_something_long_is_still_one_short_line() -> None:
    with pytest.raises(DataError) as caught:
        from_plain(Whole, {"nome": "x" * 10_000}, error=DataError)
    assert len(str(caught.value)) < 250


def test_a_class_may_refuse_values_itself() -> None:
    with pytest.raises(SpaceError, match="must be positive"):
        from_plain(Whole, {"name": "w", "parts": [{"size": -1}]})


def test_unknown_keys_are_ignored_on_request() -> None:
    row = {"name": "w", "added later": 1}
    assert from_plain(Whole, row, allow_unknown=True) == Whole("w")


def test_numbers_can_be_read_from_text() -> None:
    row = {"name": "1", "parts": [{"size": "3", "share": "1e-3"}], "scores": {"a": "0.1"}}
    assert from_plain(Whole, row, from_text=True) == Whole("1", (Part(3, 1e-3),), {"a": 0.1})
    with pytest.raises(SettingsError, match=r"^scores\.b='much': must be a number"):
        from_plain(Whole, {"name": "w", "scores": {"a": "1", "b": "much"}}, from_text=True)


def test_null_is_nan_where_a_number_is_required() -> None:
    row = {"name": "w", "parts": [{"size": 1, "share": None}], "scores": {"a": None}, "limit": None}
    whole = from_plain(Whole, row, null_is_nan=True)
    assert math.isnan(whole.parts[0].share)
    assert math.isnan(whole.scores["a"])
    assert whole.limit is None


def test_json_holds_no_nan() -> None:
    value = {"a": float("nan"), "b": (float("inf"), 1.5), 3: {2, 1}}
    assert finite(value) == {"a": None, "b": [None, 1.5], "3": [1, 2]}
    assert json.loads(strict_json(Whole("w", (), {"a": math.nan})))["scores"] == {"a": None}
    assert "NaN" not in strict_json(value)
    with pytest.raises(TypeError):
        strict_json(object())


def test_a_file_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "whole.json"
    path.write_text(strict_json(Whole("w", (Part(1),))))
    assert read_json(path, Whole) == Whole("w", (Part(1),))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "cannot be read"),
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("\u0000", "is a binary file"),
        ("[]", "must be a mapping"),
        ("null", "must be a mapping"),
        ("3", "must be a mapping"),
        ("{}", "lacks the key `name`"),
        ('{"name": {}}', "must be text"),
        ('{"name": "w", "parts": [[]]}', "must be a mapping"),
    ],
)
def test_a_damaged_file_is_one_clear_line(tmp_path: Path, text: str | None, problem: str) -> None:
    path = tmp_path / "whole.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(StorageError, match=problem) as caught:
        read_json(path, Whole)
    assert "whole.json" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(AdapterError, match=r"^adapter.*send it again"):
        read_json(path, Whole, field="adapter", remedy="send it again", error=AdapterError)


@pytest.mark.parametrize(
    "value",
    [
        *("0.5", b"7", bytearray(b"7"), True, 1j, None, [1.0], 10**400),
        *(np.bool_(True), np.array(True), np.array("0.5"), np.array(b"7"), np.str_("1")),
        *(np.array("0.5", dtype=object), np.complex64(1 + 2j), np.array(1 + 2j), np.zeros(2)),
        *(np.clongdouble(1), np.datetime64("2020-01-01", "ns"), np.timedelta64(3, "ns")),
        *(torch.tensor(True), torch.tensor(1 + 2j), torch.zeros(2), torch.zeros((), device="meta")),
    ],
)
def test_text_truth_complex_values_and_times_are_no_numbers(value: Any) -> None:
    assert to_float(value) is None


@pytest.mark.parametrize(
    "value", [np.ma.masked, np.ma.array(0.7, mask=True), np.ma.array([0.7], mask=[True])]
)
def test_a_masked_value_is_missing(value: Any) -> None:
    """Regression: it was 0.0, or what lay below the mask (issue 18)."""
    assert to_float(value) is None
    assert to_float(np.ma.array(0.5)) == to_float(np.ma.array([0.5], mask=[False])) == 0.5
    assert strict_json({"a": np.ma.masked}, indent=None) == '{"a": null}\n'


@pytest.mark.parametrize(
    "value",
    [
        *(0.5, Decimal("0.5"), Fraction(1, 2), np.float16(0.5), np.longdouble(0.5), np.array(0.5)),
        *(np.array(Decimal("0.5")), torch.tensor(0.5, dtype=torch.bfloat16)),
        torch.tensor(0.5, requires_grad=True),
    ],
)
def test_numbers_of_other_libraries_are_numbers(value: Any) -> None:
    assert to_float(value) == 0.5


def test_truth_values_are_numbers_where_rows_are_counted() -> None:
    for value in (True, np.bool_(True), np.array(True), torch.tensor(True)):
        assert to_float(value, truth=True) == 1.0
