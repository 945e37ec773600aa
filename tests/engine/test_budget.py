"""Tests of reading budgets and keeping the tracker."""

from __future__ import annotations

from typing import Any

import pytest

from autopeft.engine.budget import Budget, BudgetTracker, Spent
from autopeft.errors import SettingsError


@pytest.mark.parametrize(
    ("text", "seconds", "trials", "flops"),
    [
        ("30m", 1800, None, None),
        ("2h", 7200, None, None),
        ("90s", 90, None, None),
        ("1.5h", 5400, None, None),
        ("1h30m", 5400, None, None),
        ("50trials", None, 50, None),
        ("1 trial", None, 1, None),
        ("3e15flops", None, None, 3e15),
        ("2 PFLOPs", None, None, 2e15),
        ("30m,50trials", 1800, 50, None),
        ("30m + 50 trials 3e+15flops", 1800, 50, 3e15),
        ("1h 30m", 5400, None, None),
    ],
)
def test_budgets_are_read(
    text: str, seconds: float | None, trials: int | None, flops: float | None
) -> None:
    budget = Budget.parse(text)
    assert (budget.seconds, budget.trials, budget.flops) == (seconds, trials, flops)
    assert budget.text == text


@pytest.mark.parametrize(
    "text",
    ["", "soon", "30", "30x", "-5m", "0m", "0trials", "1.5trials", "5trials,6trials", "nan h"],
)
def test_nonsense_is_refused_in_one_line_naming_the_field(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^budget=.*;") as caught:
        Budget.parse(text)
    assert "\n" not in str(caught.value)


def test_the_search_leaves_the_reserve_alone() -> None:
    tracker = BudgetTracker(Budget.parse("100s"), confirm_share=0.3)
    tracker.spend(seconds=60)
    left = tracker.left()
    assert left is not None
    assert left.seconds == pytest.approx(10)
    tracker.spend(seconds=20)
    assert tracker.left() is None
    confirming = tracker.left(confirming=True)
    assert confirming is not None
    assert confirming.seconds == pytest.approx(20)
    tracker.spend(seconds=20)
    assert tracker.left(confirming=True) is None


def test_any_limit_ends_the_search_and_trials_do_not_end_confirmation() -> None:
    tracker = BudgetTracker(Budget.parse("100s 2trials"))
    tracker.spend(trials=2)
    assert tracker.left() is None
    assert tracker.left(confirming=True) is not None


def test_spending_is_never_negative() -> None:
    with pytest.raises(ValueError, match=">= 0"):
        BudgetTracker(Budget.parse("1h")).spend(seconds=-1)


def test_confirm_share_is_checked() -> None:
    with pytest.raises(SettingsError, match="confirm_share"):
        BudgetTracker(Budget.parse("1h"), confirm_share=1.0)


@pytest.mark.parametrize("text", ["1e999trials", "1e999s", "1e31flops", "5²trials", "٣trials"])
def test_a_number_beyond_all_budgets_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="budget"):
        Budget.parse(text)


@pytest.mark.parametrize("wrong", [{"seconds": -1.0}, {"flops": float("inf")}, {"trials": -1}])
def test_what_was_spent_is_a_finite_amount(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="what was spent is 0 or more"):
        Spent(**wrong)
