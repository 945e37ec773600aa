from dataclasses import replace

from hypothesis import given, settings
from report_samples import candidate, finalist, interrupted, lora, make_record, records, trial

from autopeft.reporting.front_view import FrontEntry, view
from autopeft.reporting.record import SearchRecord


def dominates(a: FrontEntry, b: FrontEntry) -> bool:
    """Written anew for accuracy (more is better) and trainable_params (less is better)."""
    better_or_equal = (
        a.objectives["accuracy"] >= b.objectives["accuracy"]
        and a.objectives["trainable_params"] <= b.objectives["trainable_params"]
    )
    return better_or_equal and a.objectives != b.objectives


@settings(max_examples=60, deadline=None)
@given(records())
def test_front_holds_what_nobody_dominates_and_nothing_is_hidden(record: SearchRecord) -> None:
    shown = view(record)
    rivals = [*shown.front, *shown.dominated_finalists]
    for member in shown.front:
        assert not any(dominates(rival, member) for rival in rivals)
        assert member.candidate.plan.specs
        assert member.is_confirmed == bool(record.finalists)
    for beaten in shown.dominated_finalists:
        assert not any(beaten.digest == member.digest for member in shown.front)
        if beaten.dominated_by is not None:
            winner = shown.find(beaten.dominated_by)
            assert winner is None or dominates(winner, beaten)  # None: the reference, not shown
    adapters = {f.candidate.digest for f in record.finalists if f.candidate.plan.specs}
    assert adapters <= {entry.digest for entry in rivals}


def test_front_is_sorted_by_cost_and_numbers_are_of_the_test_split() -> None:
    record = make_record()
    shown = view(record)
    costs = [entry.objectives["trainable_params"] for entry in shown.front]
    assert costs == sorted(costs)
    assert len(costs) >= 4
    by_digest = {f.candidate.digest: f for f in record.finalists}
    for entry in shown.front:
        seeds = by_digest[entry.digest].seeds
        mean = sum(seed.test["accuracy"] for seed in seeds) / len(seeds)
        assert abs(entry.objectives["accuracy"] - mean) < 1e-12
        assert (
            entry.objectives["trainable_params"] == by_digest[entry.digest].costs.trainable_params
        )


def test_a_dominated_finalist_is_named_with_its_winner() -> None:
    cheap, dear = (trial(i, candidate(lora(range(6), rank))) for i, rank in enumerate((1, 8)))
    record = replace(
        make_record(8),
        trials=(cheap, dear),
        finalists=(finalist(cheap, shift=0.1), finalist(dear, shift=-0.1)),
    )
    shown = view(record)
    assert [entry.digest for entry in shown.front] == [cheap.candidate.digest]
    assert shown.dominated_finalists[0].dominated_by == cheap.candidate.digest
    assert shown.best == cheap.candidate.digest


def test_the_pick_is_a_member_that_keeps_the_rule() -> None:
    record = make_record()
    front = view(record).front
    limit = front[2].objectives["trainable_params"]
    shown = view(replace(record, pick=f"trainable_params<={limit}"))
    assert shown.best in [entry.digest for entry in front[:3]]
    assert shown.warnings == record.warnings
    none = view(replace(record, pick="trainable_params<=1"))
    assert none.best is None
    assert "no member of the front keeps pick=trainable_params<=1" in none.warnings[-1]


def test_reference_is_shown_but_competes_with_no_member() -> None:
    record = make_record()
    nothing = record.trials[0]
    unbeatable = finalist(nothing, shift=0.39)  # as good as can be, for the price of a head
    shown = view(replace(record, finalists=(*record.finalists, unbeatable)))
    assert shown.front == view(record).front
    assert shown.reference is not None
    assert shown.reference.is_confirmed


def test_interrupted_run_shows_validation_numbers_and_says_so() -> None:
    record = make_record()
    shown = view(interrupted(record))
    assert not shown.is_confirmed
    assert not shown.is_complete
    assert "Undecided" in shown.verdict.text
    assert not shown.verdict.beats_lora
    values = {o.candidate.digest: o.values["accuracy"] for o in record.trials if o.values}
    for entry in shown.front:
        assert entry.objectives["accuracy"] == values[entry.digest]
        assert entry.objectives_ci["accuracy"] is None
        assert entry.adapter is None
    assert shown.unconfirmed == ()


def test_front_members_that_were_not_retrained_are_kept_apart() -> None:
    record = make_record()
    shown = view(record)
    confirmed = {f.candidate.digest for f in record.finalists}
    wanted = set(record.front) - confirmed - {record.reference}
    assert {entry.digest for entry in shown.unconfirmed} == wanted
    assert not any(entry.is_confirmed for entry in shown.unconfirmed)


def test_measured_costs_are_means_over_seeds() -> None:
    from autopeft.costs.objectives import objective

    one = trial(0, candidate(lora(range(2), 2)))
    done = finalist(one)
    seeds = tuple(
        replace(seed, objectives={**seed.objectives, "train_seconds": 4.0 + seed.seed})
        for seed in done.seeds
    )
    record = replace(
        make_record(8),
        objectives=(objective("accuracy"), objective("train_seconds")),
        trials=(one,),
        finalists=(replace(done, seeds=seeds),),
    )
    entry = view(record).front[0]
    assert entry.objectives["train_seconds"] == 5.0
    low, high = entry.objectives_ci["train_seconds"]
    assert low < 5.0 < high
