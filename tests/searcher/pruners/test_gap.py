"""GapPruner: who is stopped, and who never is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState, create_trial

from autopeft.errors import SettingsError
from autopeft.searcher.pruners.gap import GapPruner

Row = tuple[Sequence[float], Sequence[float]]


def study_of(
    rows: Sequence[Row], directions: Sequence[Any] = ("maximize", "minimize")
) -> optuna.Study:
    """A study of running trials; rows are (costs, {step: score})."""
    study = optuna.create_study(directions=list(directions))
    for costs, scores in rows:
        price = {f"cost{k}": cost for k, cost in enumerate(costs)}
        study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                user_attrs={"price": price},
                intermediate_values=dict(enumerate(scores)),
            )
        )
    return study


def stopped(pruner: optuna.pruners.BasePruner, rows: Sequence[Row], **kw: Any) -> list[bool]:
    study = study_of(rows, **kw)
    return [pruner.prune(study, trial) for trial in study.get_trials(deepcopy=False)]


curves = st.lists(
    st.tuples(
        st.tuples(st.integers(1, 4), st.integers(1, 4)),
        st.lists(st.integers(0, 6).map(float), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=200)
@given(curves, st.sampled_from([1.5, 3.0, 10.0]), st.booleans())
def test_a_trial_no_cheaper_or_equal_peer_beats_is_never_stopped(
    rows: list[Row], eta: float, is_minimized: bool
) -> None:
    sign = -1.0 if is_minimized else 1.0
    pruner = GapPruner(eta, costs=("cost0", "cost1"))
    directions = ("minimize" if is_minimized else "maximize", "minimize")
    decisions = stopped(pruner, rows, directions=directions)
    for (costs, scores), is_stopped in zip(rows, decisions, strict=True):
        beaten = False
        for other_costs, others in rows:
            step = min(len(scores), len(others)) - 1
            is_affordable = all(a <= b for a, b in zip(other_costs, costs, strict=True))
            beaten |= is_affordable and sign * others[step] > sign * scores[step]
        assert beaten or not is_stopped


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6)), min_size=1, max_size=15),
    st.sampled_from([1.5, 3.0, 10.0]),
    st.randoms(use_true_random=False),
)
def test_where_curves_do_not_cross_the_front_stays_whatever_the_order_of_reports(
    trials: list[tuple[int, int]], eta: float, random: Any
) -> None:
    study, pruner = study_of([((cost,), []) for cost, _ in trials]), GapPruner(eta)
    waiting = [number for number in range(len(trials)) for _ in range(3)]
    random.shuffle(waiting)
    n_reports, pruned = [0] * len(trials), set[int]()
    for number in (n for n in waiting if n not in pruned):
        trial = study.get_trials(deepcopy=False)[number]
        score = float(trials[number][1] * (n_reports[number] + 1))
        study._storage.set_trial_intermediate_value(trial._trial_id, n_reports[number], score)
        n_reports[number] += 1
        if pruner.prune(study, study.get_trials(deepcopy=False)[number]):
            pruned.add(number)
    for number in pruned:
        cost, score = trials[number]
        kept = [trials[other] for other in range(len(trials)) if other not in pruned]
        assert any(c <= cost and s > score for c, s in kept)


def test_an_expensive_trial_beaten_by_a_cheap_one_stops_and_the_cheap_one_continues() -> None:
    rows = [((1,), [0.7]), ((9,), [0.2]), ((0.1,), [0.1])]
    assert stopped(GapPruner(3, costs=("cost0",)), rows) == [False, True, False]


def test_without_peers_at_a_rung_nothing_stops() -> None:
    assert stopped(GapPruner(3, costs=("cost0",)), [((5,), [0.0])]) == [False]
    assert stopped(GapPruner(3, costs=("cost0",)), [((5,), []), ((1,), [0.9])]) == [False, False]


def test_of_many_equally_expensive_trials_about_one_in_eta_continues() -> None:
    rng = np.random.default_rng(0)
    rows = [((1,), [float(score)]) for score in rng.permutation(30)]
    assert sum(stopped(GapPruner(3, costs=("cost0",)), rows)) == 20
    assert sum(stopped(GapPruner(2, costs=("cost0",)), rows)) == 15


def test_a_peer_that_arrives_later_at_an_earlier_rung_counts() -> None:
    early = ((5,), [0.1, 0.2, 0.3])
    late = [((1,), [0.9]), ((1,), [0.8]), ((1,), [0.7])]
    assert stopped(GapPruner(3, costs=("cost0",)), [early, *late])[0]


def test_reporting_more_often_stops_no_more_of_them() -> None:
    rng = np.random.default_rng(0)
    scores = rng.permutation(36)
    often = [((1,), [float(score)] * 6) for score in scores]
    seldom = [((1,), [float(score)] * 2) for score in scores]
    pruner = GapPruner(3, costs=("cost0",))
    assert stopped(pruner, often) == stopped(GapPruner(3, costs=("cost0",)), seldom)
    assert sum(stopped(pruner, often)) == 36 - 5  # 36 / 3**2 and one


def test_the_best_qualities_pass_the_first_rung_whatever_their_gaps() -> None:
    # Twelve cheap trials of no use, six expensive ones all beaten by a cheaper one.
    rows = [((1,), [0.1])] * 12 + [((2,), [0.9])] + [((3,), [0.3 + k / 100]) for k in range(6)]
    decisions = stopped(GapPruner(3, costs=("cost0",)), rows)
    assert decisions[-6:] == [True] * 4 + [False] * 2  # the best three of 19, at eta 3
    assert not any(decisions[:13])


def test_a_late_rung_stops_nothing() -> None:
    for step, is_stopped in ((3, True), (4, False)):
        study = study_of([((1,), []), ((5,), [])])
        for trial, score in zip(study.get_trials(deepcopy=False), (0.9, 0.1), strict=True):
            study._storage.set_trial_user_attr(trial._trial_id, "train", {"steps": 10})
            study._storage.set_trial_intermediate_value(trial._trial_id, step, score)
        last = study.get_trials(deepcopy=False)[1]
        assert GapPruner(3, costs=("cost0",)).prune(study, last) is is_stopped


def test_nan_is_the_worst_score() -> None:
    rows = [((1,), [0.5]), ((1,), [float("nan")]), ((1,), [0.4])]
    assert stopped(GapPruner(3, costs=("cost0",)), rows)[1]


def test_costs_known_only_after_training_are_replaced_by_priced_ones() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        study.set_metric_names(["accuracy", "train_seconds"])
    for flops, score in [(1.0, 0.9), (2.0, 0.1)]:
        study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                user_attrs={"price": {"train_flops": flops}},
                intermediate_values={1: score},
            )
        )
    pruner = GapPruner(3)
    assert [pruner.prune(study, t) for t in study.get_trials()] == [False, True]


@pytest.mark.parametrize(("n_sites", "is_stopped"), [((12, 2), False), ((2, 12), True)])
def test_latency_is_compared_by_sites_too(n_sites: tuple[int, int], is_stopped: bool) -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        study.set_metric_names(["accuracy", "latency_ms"])
    # The first, of a method without FLOPs, is better.
    for sites, flops, score in zip(n_sites, (0.0, 2.0), (0.9, 0.1), strict=True):
        study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                user_attrs={"price": {"inference_flops": flops}, "n_sites": sites},
                intermediate_values={1: score},
            )
        )
    pruner = GapPruner(3)
    assert [pruner.prune(study, t) for t in study.get_trials()] == [False, is_stopped]


def complete_trial(k: int, **more: Any) -> FrozenTrial:
    """One of some trials that cost 1, whose rungs tell their ends."""
    return create_trial(
        state=TrialState.COMPLETE,
        user_attrs={"price": {"cost0": 1.0}},
        intermediate_values={0: 0.5 + k / 100},
        values=[0.8 + k / 100, 1.0],
        **more,
    )


def test_where_rungs_must_tell_a_trial_is_stopped_only_after_some_are_complete() -> None:
    study = study_of([((1.0,), [0.1])])
    pruner = GapPruner(n_deviations=1.0)

    def is_stopped() -> bool:
        return pruner.prune(study, study.get_trials(deepcopy=False)[0])

    for k in range(8):
        assert not is_stopped() or k >= 6
        study.add_trial(complete_trial(k))
    assert is_stopped()


@pytest.mark.parametrize(("limits", "is_stopped"), [((), True), (("forgetting<=0.05",), False)])
def test_a_complete_trial_over_a_limit_stops_no_others(
    limits: tuple[str, ...], is_stopped: bool
) -> None:
    study = study_of([((1.0,), [0.1])])
    for k in range(8):
        study.add_trial(complete_trial(k, constraints={"forgetting<=0.05": 0.3}))
    pruner = GapPruner(limits=limits, n_deviations=1.0)
    assert pruner.prune(study, study.get_trials(deepcopy=False)[0]) is is_stopped


def test_eta_is_checked() -> None:
    with pytest.raises(SettingsError, match="eta"):
        GapPruner(1.0)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"eta": "3"}, "eta='3'"),
        ({"eta": 1}, "eta=1"),
        ({"costs": 5}, "costs=5"),
        ({"min_peers": -1}, "min_peers=-1"),
        ({"n_warmup_steps": -2}, "n_warmup_steps=-2"),
        ({"n_steps": 0}, "n_steps=0"),
        ({"n_deviations": -1.0}, "n_deviations=-1.0"),
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        GapPruner(**wrong)


def test_the_changed_trials_tell_as_much_as_the_whole_study() -> None:
    """A search knows what it has written, so tens of thousands of trials need not be read."""
    told, reading = GapPruner(3.0), GapPruner(3.0)
    rng = np.random.default_rng(0)
    study = study_of([((float(rng.integers(1, 5)),), ()) for _ in range(40)])
    storage, ids = study._storage, [trial._trial_id for trial in study.get_trials()]
    changed: set[int] = set()
    gaps = []
    for step in range(3):
        for number in range(40):
            storage.set_trial_intermediate_value(ids[number], step, float(rng.integers(0, 9)))
            trials = study.get_trials(deepcopy=False)
            if number % 5 == 0:  # Not every report is followed by a decision.
                changed.add(number)
                continue
            others = [trials[each] for each in changed - {number}]
            gaps.append(told.gap(study, trials[number], others))
            changed.clear()
            assert gaps[-1] == reading.gap(study, trials[number])
    assert sum(gap > 0 for gap in gaps) > 5
