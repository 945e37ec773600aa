"""No damaged or hostile input raises anything but a UserError, or takes ten seconds."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from fuzz import run
from mutations import damaged, mutated
from targets import TARGETS


def _assert_none(n_inputs: int, seed: int) -> None:
    counts: Counter[str] = Counter()
    faults = [*run(n_inputs, seed, counts=counts)]
    assert not faults, faults[0].text
    assert sum(counts.values()) == n_inputs


@pytest.mark.filterwarnings("ignore")
def test_a_few_hundred_inputs_are_refused_or_read() -> None:
    _assert_none(400, seed=0)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(1, 11))
def test_a_hundred_thousand_inputs_are_refused_or_read(seed: int) -> None:
    _assert_none(10_000, seed)


def test_an_input_is_made_again_from_its_seed() -> None:
    row = {"a": [1, {"b": "text"}], "c": None}
    for seed in range(50):
        first, second = (mutated(row, random.Random(seed), 3) for _ in range(2))
        assert repr(first) == repr(second)
        raw, again = (damaged(b"some, text\n", random.Random(seed)) for _ in range(2))
        assert raw == again
    assert row == {"a": [1, {"b": "text"}], "c": None}


def test_an_exception_of_another_type_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("what nobody checked")

    monkeypatch.setitem(TARGETS, "broken", (1, broken))
    (fault,) = run(1, 0, only="broken")
    assert "KeyError" in fault.kind
