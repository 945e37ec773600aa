"""Optuna's pruners in studies with several directions."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from autopeft.searcher.pruners.registry import Rungs, make_pruner
from autopeft.searcher.pruners.single_objective import SingleObjectivePruner


@pytest.mark.parametrize("name", ["median", "percentile", "asha", "hyperband"])
def test_optunas_own_pruners_work_on_several_directions(name: str) -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    pruner = make_pruner(name, Rungs(1, 9))
    assert isinstance(pruner, SingleObjectivePruner)
    decisions = []
    for number in range(60):
        quality = 0.9 if number % 2 else 0.0
        study.add_trial(create_trial(state=TrialState.RUNNING))
        for step in (1, 3, 9):
            trial = study.get_trials(deepcopy=False)[number]
            study._storage.set_trial_intermediate_value(
                trial._trial_id, step, quality + number / 1e3
            )
            trial = study.get_trials(deepcopy=False)[number]
            if pruner.prune(study, trial):
                decisions.append(quality)
                study.tell(number, state=TrialState.PRUNED)
                break
        else:
            study.tell(number, [quality, 1.0])
    assert 0.0 in decisions


def test_optunas_pruners_read_an_ended_trial_once(monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    pruner = make_pruner("median", Rungs())
    n_reads = []

    class Counted(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            n_reads.append(index)
            return super().__getitem__(index)

        def __iter__(self) -> Any:
            n_reads.extend(range(len(self)))
            return super().__iter__()

    usual = study.get_trials
    for number in range(40):
        study.add_trial(create_trial(state=TrialState.RUNNING, intermediate_values={1: 0.5}))
        trial = usual(deepcopy=False)[number]
        with monkeypatch.context() as patch:
            patch.setattr(study, "get_trials", lambda **options: Counted(usual(**options)))
            n_reads.clear()
            pruner.prune(study, trial)
        assert len(n_reads) < 8, number
        study.tell(number, [0.5, 1.0])
