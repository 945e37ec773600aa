"""The planner: what a budget buys, whatever the machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.confirm.finalists import Retraining
from autopeft.engine.search_plan import (
    ENOUGH_TRIALS,
    LEAST_ROWS,
    PLENTY,
    Pace,
    SearchPlan,
    Speed,
    TextSpeed,
    Workload,
    choose_plan,
    confirmation_seconds,
    minutes_for,
    pinned_sizes,
    priced,
    remedy,
    revised,
    training_seconds,
)
from autopeft.errors import SettingsError
from autopeft.settings import SearchSettings

WORK = Workload(
    budget=1800,
    seconds=1750,
    n_workers=2,
    n_train=2000,
    batch_size=16,
    n_validation=400,
    test_share=2.5,
)
SPEED = Speed(step=0.2, row=0.01, start=0.1)


def slower(factor: float) -> Speed:
    return Speed(SPEED.step * factor, SPEED.row * factor, SPEED.start)


def test_a_fast_machine_trains_longer_and_a_slow_one_still_searches() -> None:
    plans = [choose_plan(slower(factor), WORK, {}) for factor in (0.05, 1.0, 5.0)]
    assert [plan.n_trials >= ENOUGH_TRIALS for plan in plans] == [True, True, True]
    steps = [plan.steps for plan in plans]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > 100 > steps[-1]
    assert plans[0].n_trials >= PLENTY
    assert (plans[0].max_finalists, plans[0].confirm_seeds) == (6, 3)
    assert plans[-1].max_finalists < 6


def test_a_budget_that_cannot_pay_gets_the_most_it_buys_and_says_what_would() -> None:
    plan = choose_plan(slower(12), WORK, {})
    assert 0 < plan.n_trials < ENOUGH_TRIALS
    text = remedy(plan, slower(12), WORK, {})
    minutes = int(text.partition("m would pay")[0].rpartition(" ")[2])
    larger = replace(WORK, budget=60.0 * minutes, seconds=60.0 * minutes - 50)
    assert choose_plan(slower(12), larger, {}).n_trials >= ENOUGH_TRIALS


def test_generated_text_counts_at_the_end_at_rungs_and_in_confirmations() -> None:
    plan = SearchPlan(steps=100, rungs=3, rung_rows=64)
    end = TextSpeed(row=0.5, n_rows=200)
    for text, n_generated in ((end, 200), (replace(end, is_at_rungs=True), 200 + 64)):
        slow = replace(SPEED, texts=(text, text))
        more = training_seconds(plan, slow, WORK) - training_seconds(plan, SPEED, WORK)
        assert more == pytest.approx(0.8 * 2 * 0.5 * n_generated)
        assert confirmation_seconds(plan, slow, WORK) > confirmation_seconds(plan, SPEED, WORK)
        n_trials = [priced(plan, speed, WORK, {}).n_trials for speed in (slow, SPEED)]
        assert n_trials[0] < n_trials[1]


QUICKSTART = replace(WORK, budget=465, seconds=440, test_share=1.25)
"""The first example on two cores without bf16."""


@pytest.mark.parametrize("step", [0.2, 0.305, 0.5])
@pytest.mark.parametrize("fixed", [0.0, 0.1])
def test_the_quickstart_is_a_search_on_a_slow_machine(step: float, fixed: float) -> None:
    speed = Speed(step, row=step / 32, start=0.15, fixed=fixed * step)
    plan = choose_plan(speed, QUICKSTART, {})
    assert plan.n_trials >= ENOUGH_TRIALS
    # Four LoRAs and the reference, then one LoRA to five proposals.
    assert (plan.n_trials - 5 - plan.n_portfolio) * 5 / 6 >= 20
    assert plan.steps == 50
    rows = {0.2: "", 0.305: " of 8 rows", 0.5: " of 4 rows"}[step]
    assert f"of 50 steps{rows};" in plan.line()
    # Where rows cost nothing, or are the user's, they stay.
    assert choose_plan(replace(speed, fixed=step), QUICKSTART, {}).batch_size == 16
    assert choose_plan(speed, QUICKSTART, {"batch_size": 16}).batch_size == 16


@given(
    factor=st.floats(0.01, 50),
    seconds=st.floats(30, 1e5),
    workers=st.integers(1, 64),
    n_train=st.integers(1, 10**6),
    steps=st.none() | st.integers(1, 2000),
    seeds=st.none() | st.integers(1, 9),
)
def test_what_is_pinned_stays_and_confirmation_fits(
    factor: float, seconds: float, workers: int, n_train: int, steps: int | None, seeds: int | None
) -> None:
    work = replace(WORK, budget=seconds, seconds=seconds, n_workers=workers, n_train=n_train)
    pinned = {"steps": steps, "confirm_seeds": seeds}
    pinned = {name: value for name, value in pinned.items() if value is not None}
    speed = slower(factor)
    plan = choose_plan(speed, work, pinned)
    for name, value in pinned.items():
        assert getattr(plan, name) == value
    assert 0.1 <= plan.confirm_share <= 0.6
    # Unless there is too little for anything, what is kept pays for the confirmations.
    if plan.confirm_share < 0.6:
        assert confirmation_seconds(plan, speed, work) <= (plan.confirm_share + 1e-3) * seconds
    assert plan.n_trials >= 0
    assert plan.n_portfolio <= max(0, plan.n_trials // 2)


@given(factor=st.floats(0.01, 100), seconds=st.floats(60, 1e5), workers=st.integers(1, 16))
def test_whatever_the_speed_enough_trials_are_kept_where_any_plan_keeps_them(
    factor: float, seconds: float, workers: int
) -> None:
    work = replace(WORK, budget=seconds, seconds=0.95 * seconds, n_workers=workers)
    speed = slower(factor)
    plan = choose_plan(speed, work, {})
    if plan.n_trials < ENOUGH_TRIALS:
        smallest = SearchPlan(
            steps=50, batch_size=LEAST_ROWS, rung_rows=64, max_finalists=2, confirm_seeds=2
        )
        assert priced(smallest, speed, work, {}).n_trials < ENOUGH_TRIALS
    # Four LoRAs and the reference, then one LoRA to five proposals.
    later = plan.n_trials - (5 + plan.n_portfolio)
    if plan.n_trials >= 13:
        assert later * 5 / 6 >= plan.n_trials / 2 - 1


@given(factor=st.floats(0.05, 20), more=st.floats(1.1, 10))
def test_more_time_never_buys_less(factor: float, more: float) -> None:
    speed, rich = slower(factor), replace(WORK, budget=WORK.budget * more, seconds=1750 * more)
    poor_plan, rich_plan = choose_plan(speed, WORK, {}), choose_plan(speed, rich, {})

    def seconds(plan: SearchPlan) -> float:
        """Of all trainings, and of the confirmations that are planned."""
        trials = plan.n_trials * training_seconds(plan, speed, rich) / rich.n_workers
        return trials + confirmation_seconds(plan, speed, rich)

    # Fewer or shorter trials are planned for the sake of more confirmation only.
    assert seconds(rich_plan) >= seconds(poor_plan) * 0.95
    assert rich_plan.n_trials >= min(poor_plan.n_trials, ENOUGH_TRIALS)


def test_rungs_that_are_asked_for_and_a_share_that_is_set_count() -> None:
    plan = SearchPlan(steps=40)
    one_rung = training_seconds(plan, SPEED, WORK)
    assert training_seconds(plan, SPEED, replace(WORK, earliest_rung=1)) != one_rung
    assert training_seconds(SearchPlan(), SPEED, replace(WORK, eta=2)) != training_seconds(
        SearchPlan(), SPEED, WORK
    )
    # More minutes buy no more trials than the share leaves to the search.
    small = choose_plan(slower(12), WORK, {"confirm_share": 0.6})
    minutes = [
        int(remedy(small, slower(12), WORK, pinned).partition("m would pay")[0].rpartition(" ")[2])
        for pinned in ({}, {"confirm_share": 0.6})
    ]
    assert minutes[0] < minutes[1]


def test_a_budget_without_a_single_trial_says_what_one_takes() -> None:
    work = replace(QUICKSTART, budget=45.0, seconds=3.0)
    text = remedy(choose_plan(slower(12), work, {}), slower(12), work, {})
    assert "may not pay for a single trial" in text
    assert "3 s are left after the start" in text
    one, enough = (
        minutes_for(n, choose_plan(slower(12), work, {}), slower(12), work, {})
        for n in (1, ENOUGH_TRIALS)
    )
    assert f"{one}m would pay for one, {enough}m would pay for 40" in text
    assert 1 <= one < enough


def test_settings_state_sizes_or_leave_them_open() -> None:
    assert pinned_sizes(SearchSettings()) == {}
    assert pinned_sizes(SearchSettings(steps=7, confirm_share=0.0)) == {
        "steps": 7,
        "confirm_share": 0.0,
    }
    sizes = ("max_finalists", "confirm_seeds", "confirm_share", "rungs")
    plan = SearchPlan.of(SearchSettings(steps=7))
    assert plan == SearchPlan(steps=7, open=sizes)
    assert plan.most_seeds == 5
    pinned = SearchPlan.of(SearchSettings(confirm_seeds=3))
    assert pinned.open == ("max_finalists", "confirm_share", "rungs")
    assert pinned.most_seeds == 3


OPEN = SearchPlan.of(SearchSettings())
FRUGAL = replace(OPEN, steps=50, max_finalists=2, confirm_seeds=2, rung_rows=64, n_trials=41)


def thorough(plan: SearchPlan) -> tuple[int, int]:
    return plan.max_finalists, plan.confirm_seeds


def revise(
    plan: SearchPlan, *, dear: float, pace: Pace | None, left: float = 1500.0, n_workers: int = 2
) -> SearchPlan:
    """The budget is 1800 s; a training takes 30 s, that of the dearest nominee `dear`."""
    return revised(
        plan,
        lambda n: [Retraining(30.0)] * (n + 1) + [Retraining(dear)],
        budget=1800.0,
        seconds_left=left,
        n_workers=n_workers,
        pace=pace,
    )


def test_what_is_confirmed_already_takes_nothing_of_the_budget_left() -> None:
    def left_of_a_race(n_begun: int, seconds_left: float) -> SearchPlan:
        begun = [Retraining(30.0, n_begun)] * 4
        return revised(
            FRUGAL, lambda n: begun, budget=1800.0, seconds_left=seconds_left, n_workers=2
        )

    # Four trainings of 30 s on two workers: 2.4 seeds each, and a wait in each of three rounds.
    assert thorough(left_of_a_race(0, 190.0)) == (6, 3)
    assert thorough(left_of_a_race(0, 188.0)) < (6, 3)
    assert thorough(left_of_a_race(2, 40.0)) == (6, 3)
    assert thorough(left_of_a_race(3, 0.0)) == (6, 3)


@given(
    dear=st.floats(1, 100),
    trial=st.floats(0.1, 300),
    n_trials=st.integers(4, 200),
    left=st.floats(0, 1800),
    n_workers=st.integers(1, 64),
)
def test_what_is_kept_pays_for_the_seeds_of_what_would_be_confirmed(
    dear: float, trial: float, n_trials: int, left: float, n_workers: int
) -> None:
    pace = Pace(n_trials, trial)
    plan = revise(FRUGAL, dear=dear, pace=pace, left=left, n_workers=n_workers)
    assert (plan.steps, plan.rung_rows) == (50, 64)
    all_once = (30.0 * (plan.max_finalists + 1) + dear) / n_workers
    n_seeds = 2.4 if plan.confirm_seeds == 3 else 2.0
    if plan.confirm_share < 0.6:
        assert plan.confirm_share * 1800 >= max(n_seeds * all_once, dear)
    # Finalists and seeds are no dearer than enough trials allow.
    if thorough(plan) != (2, 2):
        assert plan.n_trials >= ENOUGH_TRIALS


def test_a_surplus_goes_to_seeds_and_finalists_first() -> None:
    assert thorough(revise(FRUGAL, dear=30, pace=Pace(10, 15.0))) == (6, 3)
    plan = revise(FRUGAL, dear=30, pace=Pace(10, 80.0))
    assert (2, 2) < thorough(plan) < (6, 3)
    assert plan.n_trials >= ENOUGH_TRIALS
    pinned = revise(replace(FRUGAL, open=("confirm_share",)), dear=30, pace=Pace(10, 15.0))
    assert thorough(pinned) == (2, 2)
    assert pinned.n_trials > revise(FRUGAL, dear=30, pace=Pace(10, 15.0)).n_trials
    kept = revise(replace(FRUGAL, open=("max_finalists",)), dear=30, pace=Pace(10, 15.0))
    assert kept.confirm_share == FRUGAL.confirm_share


def test_time_that_is_missing_is_taken_from_seeds_and_finalists() -> None:
    plan = revise(OPEN, dear=30, pace=Pace(10, 87.0))
    assert thorough(plan) == (2, 2)
    assert plan.n_trials == pytest.approx(ENOUGH_TRIALS, abs=2)
    slow = revise(OPEN, dear=30, pace=Pace(10, 300.0))
    assert slow.n_trials < ENOUGH_TRIALS
    assert slow.n_portfolio < 8


def test_at_the_end_of_the_search_all_that_is_left_is_spent() -> None:
    plans = [revise(OPEN, dear=30, pace=None, left=left) for left in (400.0, 230.0, 5.0)]
    assert [thorough(plan) for plan in plans] == [(6, 3), (3, 3), (2, 2)]


def test_the_plan_is_told_in_one_line() -> None:
    line = replace(SearchPlan(), n_trials=60).line()
    assert line == (
        "plan: about 60 trials of 100 steps; up to 6 finalists with up to 3 seeds each, "
        "30% of the budget"
    )


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"rungs": -3}, {"rung_rows": 2**40}])
def test_a_plan_that_was_kept_has_sizes_in_their_limits(wrong: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        SearchPlan(**wrong)  # type: ignore[arg-type]
