"""The latest value of every trial, and what is counted of them."""

from __future__ import annotations

from dataclasses import replace

from autopeft.costs import PriceTable, Topology
from autopeft.costs.objectives import objective
from autopeft.searcher.latest_trials import LatestTrials
from autopeft.searcher.samplers.observations import History
from autopeft.searcher.space.space import SearchSpace
from autopeft.trial import INTERRUPTED, Trial

TOPOLOGY = Topology(2, {"attn.q": (64, 64), "attn.v": (64, 64)})
SPACE = SearchSpace.from_source({"methods": ["lora", "ia3"]}, TOPOLOGY)
PRICES = PriceTable.from_topology(TOPOLOGY)


def trial(number: int, origin: str = "search") -> Trial:
    candidate = SPACE.baselines(8)[number % 8]
    return Trial(number, candidate, PRICES.price(candidate), origin)


def test_a_changed_trial_keeps_its_place_and_counts_once() -> None:
    trials = LatestTrials()
    for number in (3, 1, 2):
        trials.put(trial(number, "baseline" if number == 1 else "search"))
    trials.put(replace(trials[0], audited_at=10))
    trials.put(replace(trials[0], state="complete"))
    trials.put(replace(trials[2], audited_at=10))
    trials.put(replace(trials[2], audited_at=0))
    assert [each.number for each in trials] == [3, 1, 2]
    assert [each.number for each in trials.by_number()] == [1, 2, 3]
    assert trials.n_audited == 1
    assert trials.of(3) is trials[0]
    assert trials.of(4) is None
    assert [each.number for each in trials.baselines()] == [1]
    trials.put(replace(trials[1], state="failed", reason=INTERRUPTED))
    assert trials.baselines() == []


def test_a_history_reads_the_same_from_changes_as_from_all_trials() -> None:
    """A thousand trials may run: what has not changed is not looked at, and nothing is missed."""
    trials, quality = LatestTrials(), objective("accuracy")
    from_changes, from_all = History(SPACE, quality), History(SPACE, quality)
    for number in range(8):
        trials.put(trial(number))
        if number % 3 == 2:
            rungs = ((10, 0.1 * number),)
            trials.put(replace(trials[number - 1], rungs=rungs))
            trials.put(replace(trials[number - 1], state="pruned", rungs=rungs))
            values = {"accuracy": 0.1 * number}
            trials.put(replace(trials[number - 2], state="complete", values=values))
        if number != 4:
            from_changes.update(trials)
            from_all.update(tuple(trials))
    for history in (from_changes, from_all):
        assert list(history.running) == [2, 5, 6, 7]
        assert history.complete == [0, 3]
        assert history.pruned == [1, 4]
    assert from_changes.ended == from_all.ended
    assert from_changes.trials == from_all.trials
    other = LatestTrials()
    other.put(trial(100))
    from_changes.update(other)
    assert list(from_changes.running) == [0]
