"""Any Optuna study of several objectives can be pruned, whatever its sampler."""

from __future__ import annotations

import functools
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FixedTrial, TrialState

from autopeft import GapPruner, PrunableTrial, UserError, prunable

N_STEPS = 12


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.WARNING)
    yield
    optuna.logging.set_verbosity(level)


def curve(trial: optuna.Trial) -> tuple[float, int]:
    """Quality that grows with the cost at a good rate, and the cost."""
    width = trial.suggest_int("width", 1, 8)
    rate = trial.suggest_float("rate", 1e-3, 1.0, log=True)
    quality = 1.0 - 1.0 / (1 + width) - 0.2 * abs(rate - 0.03) ** 0.5
    return quality, width


@prunable
def objective(trial: optuna.Trial) -> tuple[float, float]:
    """As in a study of one objective, but for the decorator and the price."""
    quality, width = curve(trial)
    trial.set_user_attr("price", {"width": width})
    for step in range(N_STEPS):
        trial.report(quality * (1 - 0.5 / (step + 1)), step)
        if trial.should_prune():
            raise optuna.TrialPruned
    return quality, width


def study_of(pruner: Any = None, sampler: BaseSampler | None = None, **kw: Any) -> optuna.Study:
    return optuna.create_study(
        directions=kw.pop("directions", ["maximize", "minimize"]),
        sampler=sampler or RandomSampler(seed=0),
        pruner=pruner or GapPruner(n_steps=N_STEPS),
        **kw,
    )


def journal(path: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(path)))


def states(study: optuna.Study) -> list[TrialState]:
    return [trial.state for trial in study.get_trials(deepcopy=False)]


@pytest.mark.parametrize(
    "sampler", [TPESampler(seed=1), NSGAIISampler(population_size=8, seed=1), RandomSampler(1)]
)
def test_samplers_go_on_after_pruned_trials(sampler: BaseSampler) -> None:
    study = study_of(sampler=sampler)
    study.optimize(objective, n_trials=40)
    assert 10 <= states(study).count(TrialState.PRUNED) <= 30
    assert {*states(study)} == {TrialState.PRUNED, TrialState.COMPLETE}
    for trial in study.trials:
        last = max(trial.intermediate_values)
        if trial.state == TrialState.PRUNED:
            assert last <= N_STEPS / 3
            assert trial.constraints["pruned"] > 0
        else:
            assert last == N_STEPS - 1
            assert not trial.constraints


def test_what_is_pruned_was_not_on_the_front() -> None:
    """The curves do not cross here, so pruning changes the steps and nothing else."""
    pruned, whole = study_of(), study_of(optuna.pruners.NopPruner())
    for study in (pruned, whole):
        study.optimize(objective, n_trials=40)
    fronts = [[trial.number for trial in study.best_trials] for study in (pruned, whole)]
    assert fronts[0] == fronts[1]
    n_steps = [sum(len(t.intermediate_values) for t in s.trials) for s in (pruned, whole)]
    assert n_steps[0] < 0.7 * n_steps[1]


def test_threads_share_one_pruner() -> None:
    study = study_of()
    study.optimize(objective, n_trials=40, n_jobs=4)
    assert states(study).count(TrialState.PRUNED) >= 10


def test_a_stored_study_goes_on_in_another_process(tmp_path: Path) -> None:
    storage = journal(tmp_path / "study.log")
    first = study_of(storage=storage, study_name="a")
    first.optimize(objective, n_trials=12)
    pruner = pickle.loads(pickle.dumps(first.pruner))  # with what it knew
    second = optuna.load_study(
        study_name="a",
        storage=journal(tmp_path / "study.log"),
        pruner=pruner,
        sampler=RandomSampler(seed=9),
    )
    second.optimize(objective, n_trials=12)
    assert TrialState.PRUNED in states(second)[12:]


def test_a_pruner_keeps_studies_of_one_name_apart(tmp_path: Path) -> None:
    pruner = GapPruner(n_steps=N_STEPS)
    for k in range(2):
        study = study_of(pruner, study_name="a", storage=journal(tmp_path / f"{k}.log"))
        study.optimize(objective, n_trials=1 + 5 * k)
    assert states(study)[0] == TrialState.COMPLETE  # Alone in its study.


def test_quality_may_come_second() -> None:
    @prunable
    def swapped(trial: Any) -> tuple[float, float]:
        quality, width = objective(trial)
        return width, quality

    study = study_of(GapPruner(objective=1, n_steps=N_STEPS), directions=["minimize", "maximize"])
    study.optimize(swapped, n_trials=40)
    usual = study_of()
    usual.optimize(objective, n_trials=40)
    assert states(study) == states(usual)


def test_costs_may_be_a_function_of_the_parameters() -> None:
    @prunable
    def bare(trial: Any) -> tuple[float, float]:
        quality, width = curve(trial)
        for step in range(N_STEPS):
            trial.report(quality * (1 - 0.5 / (step + 1)), step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return quality, width

    study = study_of(GapPruner(costs=lambda params: params["width"], n_steps=N_STEPS))
    study.optimize(bare, n_trials=40)
    usual = study_of()
    usual.optimize(objective, n_trials=40)
    assert states(study) == states(usual)


def test_one_objective_needs_neither_decorator_nor_costs() -> None:
    def single(trial: optuna.Trial) -> float:
        quality, _ = curve(trial)
        for step in range(N_STEPS):
            trial.report(quality, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return quality

    found = []
    for function in (single, prunable(single)):
        study = optuna.create_study(
            direction="maximize", sampler=TPESampler(seed=0), pruner=GapPruner(n_steps=N_STEPS)
        )
        study.optimize(function, n_trials=40)
        found.append(states(study))
    assert found[0] == found[1]
    assert TrialState.PRUNED in found[0]


def test_one_who_goes_on_is_an_ordinary_trial() -> None:
    @prunable
    def stubborn(trial: Any) -> tuple[float, float]:
        quality, width = curve(trial)
        trial.set_user_attr("price", width)
        trial.report(quality, 0)
        asked.append(trial.should_prune())
        return quality, width

    asked: list[bool] = []
    study = study_of()
    study.optimize(stubborn, n_trials=20)
    assert any(asked)
    assert not any(trial.constraints for trial in study.trials)


def test_asked_trials_can_be_told() -> None:
    study = study_of(sampler=TPESampler(seed=0, n_startup_trials=2))
    for score in (0.9, 0.2, 0.1, 0.0, 0.8):
        trial = PrunableTrial(study.ask())
        assert isinstance(trial, optuna.Trial)
        trial.suggest_int("width", 1, 8)
        trial.set_user_attr("price", {"seconds": 3})
        trial.report(score, 0)
        if trial.should_prune():
            trial.mark_pruned()
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, [score, 3.0])
    assert states(study).count(TrialState.PRUNED) == 3


def test_a_method_with_other_arguments_is_an_objective() -> None:
    class Objective:
        @prunable
        def __call__(self, trial: optuna.Trial, *, n_steps: int) -> tuple[float, float]:
            quality, width = curve(trial)
            trial.set_user_attr("price", width)
            for step in range(n_steps):
                trial.report(quality, step)
                if trial.should_prune():
                    raise optuna.TrialPruned
            return quality, width

    study = study_of(sampler=TPESampler(seed=0, n_startup_trials=5))
    study.optimize(functools.partial(Objective(), n_steps=3), n_trials=20)
    assert TrialState.PRUNED in states(study)


def test_a_fixed_trial_runs_to_its_end() -> None:
    trial: Any = FixedTrial({"width": 3, "rate": 0.03})
    assert objective(trial)[1] == 3


@pytest.mark.parametrize(
    ("value", "step", "problem"),
    [
        ("0.5", 3, "value='0.5': must be a number"),
        (None, 3, "value=None: must be a number"),
        (0.5, 1, "step=1: comes after step 2; report steps in order"),
        (0.5, 2, "step=2: comes after step 2"),
        (0.5, 2.5, "step=2.5: must be a whole number"),
        (0.5, "last", "step='last': must be a whole number"),
        (0.5, -1, "step=-1: must be a whole number"),
    ],
)
def test_a_wrong_report_is_refused(value: Any, step: Any, problem: str) -> None:
    trial = PrunableTrial(study_of().ask())
    trial.report(0.1, 2)
    with pytest.raises(UserError, match=problem):
        trial.report(value, step)


@pytest.mark.parametrize(
    ("pruner", "directions", "problem"),
    [
        (GapPruner(), None, "price=None: trial 0 has no costs; set them before it reports"),
        (GapPruner(costs=lambda p: p["depth"]), None, "fails for trial 0 .KeyError: 'depth'"),
        (GapPruner(), ["minimize", "maximize"], "all are minimized; give GapPruner.objective="),
        (GapPruner(objective=2), None, "objective=2: the study has 2 objectives"),
        (optuna.pruners.MedianPruner(), None, "handles one objective, but the study has several"),
    ],
)
def test_what_cannot_decide_is_refused(pruner: Any, directions: Any, problem: str) -> None:
    study = study_of(pruner, directions=directions or ["maximize", "minimize"])
    trial = PrunableTrial(study.ask())
    trial.report(0.1, 0)
    with pytest.raises(UserError, match=problem) as caught:
        trial.should_prune()
    assert "\n" not in str(caught.value)


def test_names_of_the_metrics_choose_the_costs() -> None:
    study = study_of()
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        study.set_metric_names(["accuracy", "seconds"])
    trial = PrunableTrial(study.ask())
    trial.set_user_attr("price", {"bytes": 3})
    trial.report(0.1, 0)
    with pytest.raises(UserError, match="has no cost 'seconds'"):
        trial.should_prune()
    trial.set_user_attr("price", {"bytes": 3, "seconds": 4})
    assert not trial.should_prune()


def test_reports_before_the_warm_up_are_not_compared() -> None:
    study = study_of(GapPruner(costs=lambda params: 1, n_warmup_steps=2))
    for score in (0.9, 0.1):
        trial = PrunableTrial(study.ask())
        asked = []
        for step in (0, 1, 2):
            trial.report(score, step)
            asked.append(trial.should_prune())
    assert asked == [False, False, True]


def test_a_trial_of_another_script_is_no_ones_peer() -> None:
    study = study_of(GapPruner(costs=lambda params: params["width"]))
    for width, score in ((None, 0.9), (3, 0.1)):
        trial = PrunableTrial(study.ask())
        if width is not None:
            trial.suggest_int("width", width, width)
        trial.report(score, 0)
    assert not trial.should_prune()
