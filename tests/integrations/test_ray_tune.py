"""GapScheduler decides as GapPruner does, for the trials of Ray Tune."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial
from ray.tune.schedulers import TrialScheduler

from autopeft import GapPruner, UserError
from autopeft.integrations.ray_tune import GapScheduler

# A real Tuner runs it in tests/examples/test_pruning_examples.py.


def width_of(config: dict[str, Any]) -> float:
    return float(config["width"])


def trial(number: int, **config: Any) -> Any:
    return SimpleNamespace(trial_id=f"t{number}", config=config)


def scheduler(costs: Any = width_of, **settings: Any) -> GapScheduler:
    return GapScheduler(costs, metric="score", mode="max", **settings)


def decide(made: GapScheduler, one: Any, step: Any, score: Any, **others: Any) -> bool:
    """Whether a trial is stopped after a report."""
    result = {"training_iteration": step, "score": score, **others}
    return bool(made.on_trial_result(None, one, result) == TrialScheduler.STOP)


def test_it_decides_as_the_pruner_does() -> None:
    rng = np.random.default_rng(0)
    made = scheduler(max_t=12)
    pruner = GapPruner(n_steps=12)
    study = optuna.create_study(directions=["maximize", "minimize"])
    n_stopped = 0
    for number in range(40):
        width, level = int(rng.integers(1, 9)), float(rng.random())
        one = trial(number, width=width)
        study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={"price": width}))
        for step in range(1, 12):
            score = level * step
            trial_id = study.get_trials(deepcopy=False)[number]._trial_id
            study._storage.set_trial_intermediate_value(trial_id, step, score)
            is_stopped = pruner.prune(study, study.get_trials(deepcopy=False)[number])
            assert decide(made, one, step, score) is is_stopped
            if is_stopped:
                n_stopped += 1
                break
    assert 10 < n_stopped < 35
    assert made.debug_string() == f"GapScheduler: {n_stopped} of 40 trials stopped early"


def test_a_smaller_metric_can_be_better() -> None:
    made = GapScheduler(width_of, metric="score", mode="min")
    assert [decide(made, trial(n, width=1), 1, s) for n, s in enumerate((0.1, 0.9, 0.05))] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("costs", ["width", ["width", "depth"], lambda config: config["width"]])
def test_costs_are_in_the_config_or_the_reports(costs: Any) -> None:
    made = scheduler(costs)
    assert not decide(made, trial(0, width=1), 1, 0.9, depth=2)
    assert not decide(made, trial(1, width=0.5), 1, 0.1, depth=1)  # cheaper
    assert decide(made, trial(2, width=3), 1, 0.1, depth=2)


def test_trials_end_at_max_t() -> None:
    made = scheduler(max_t=9)
    assert [decide(made, trial(0, width=1), step, 0.5) for step in (8, 9)] == [False, True]


def test_reports_before_the_grace_period_are_not_compared() -> None:
    made = scheduler(grace_period=3)
    for number, score in enumerate((0.9, 0.1)):
        one = trial(number, width=1)
        assert [decide(made, one, step, score) for step in (1, 2, 3)] == [False, False, score < 0.5]


def test_it_can_be_pickled_with_its_tuner() -> None:
    made = scheduler()
    decide(made, trial(0, width=1), 1, 0.9)
    assert decide(pickle.loads(pickle.dumps(made)), trial(1, width=1), 1, 0.1)


def test_metric_and_mode_are_given_once() -> None:
    made = GapScheduler("width", metric="score")
    assert not made.set_search_properties("loss", "min")
    assert made.set_search_properties(None, "min")
    assert made.metric == "score"
    for metric, missing in ((None, "metric=None: is missing"), ("a", "mode=None")):
        with pytest.raises(UserError, match=missing):
            GapScheduler("width", metric=metric).on_trial_add(None, trial(0))


@pytest.mark.parametrize(
    ("costs", "step", "score", "problem"),
    [
        ("depth", 1, 0.5, r"costs={}: trial t0 has no costs; put it into the config"),
        (["width", "depth"], 1, 0.5, "trial t0 has no cost 'depth'"),
        (lambda config: config["depth"], 1, 0.5, "the function fails for trial t0"),
        (lambda config: "much", 1, 0.5, "must be a finite number"),
        ("width", 1, "good", "score='good': trial t0 reports no number"),
        ("width", 1, None, "score=None: trial t0 reports no number"),
        ("width", 1.5, 0.5, "training_iteration=1.5: must be a whole number"),
        ("width", None, 0.5, "training_iteration=None: must be a whole number"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    costs: Any, step: Any, score: Any, problem: str
) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        decide(scheduler(costs), trial(0, width=3), step, score)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"max_t": 0}, "max_t=0"),
        ({"reduction_factor": 1}, "reduction_factor=1"),
        ({"costs": []}, "must name at least one"),
    ],
)
def test_arguments_are_checked(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        GapScheduler(**{"costs": "width", **settings})
