"""The steps at which a training reports."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.errors import SettingsError
from autopeft.training.rungs import rung_steps


def test_rungs_are_parts_of_the_end() -> None:
    assert rung_steps(100, 3, 3) == (11, 33, 100)
    assert rung_steps(2, 3, 3) == (1, 2)
    assert rung_steps(50, 2, 1) == (50,)
    assert rung_steps(100, 3, 3, earliest=25) == (33, 100)
    assert rung_steps(12, 3, 3, earliest=25) == (12,)


@given(st.integers(1, 5000), st.integers(2, 5), st.integers(1, 7))
def test_rungs_increase_and_end_at_the_end(steps: int, eta: int, n: int) -> None:
    rungs = rung_steps(steps, eta, n)
    assert list(rungs) == sorted(set(rungs))
    assert rungs[0] >= 1
    assert rungs[-1] == steps
    assert len(rungs) <= n


@pytest.mark.parametrize("arguments", [(0, 3, 3), (10, 1, 3), (10, 3, 0)])
def test_impossible_rungs(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(SettingsError, match="must hold"):
        rung_steps(*arguments)
