"""A rung is scored while it saves more than it takes."""

from __future__ import annotations

from autopeft.engine.rung_value import RungValue


def searched(n: int, n_stopped: int, *, scoring: float, before: float = 5.0) -> RungValue:
    """A search of n trials of 15 seconds, of which the last ones are stopped at the rung."""
    value = RungValue()
    for number in range(n):
        is_stopped = number >= n - n_stopped
        value.note_rung(25, before, scoring=scoring, is_stopped=is_stopped)
        if not is_stopped:
            value.note_end(15.0)
    return value


def test_a_rung_that_stops_nothing_is_given_up_sooner_the_dearer_it_is() -> None:
    assert searched(9, 0, scoring=2.0).without_value([25]) == ()
    assert searched(14, 0, scoring=2.0).without_value([25]) == (25,)
    assert searched(14, 0, scoring=0.5).without_value([25]) == ()
    assert searched(40, 0, scoring=0.5).without_value([25]) == (25,)
    assert searched(40, 0, scoring=0.0).without_value([25]) == ()


def test_a_rung_that_saves_its_price_stays() -> None:
    assert searched(40, 8, scoring=2.0).without_value([25]) == ()
    assert searched(40, 2, scoring=2.0).without_value([25]) == (25,)
    # Late in a training, a stop saves little.
    assert searched(40, 8, scoring=2.0, before=13.0).without_value([25]) == (25,)


def test_nothing_is_judged_before_enough_trials_are_complete_nor_what_was_not_reached() -> None:
    assert searched(8, 0, scoring=9.0).without_value([25]) == ()
    assert searched(40, 0, scoring=2.0).without_value([50]) == ()
