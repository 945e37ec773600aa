"""Pruners that handle one direction, in studies with several: Optuna's own, for comparison."""

from __future__ import annotations

import optuna
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState


class SingleObjectivePruner(BasePruner):
    """Runs one of Optuna's pruners in a study with several directions.

    Optuna's pruners reject such studies, so they get a copy of it in memory with the first
    direction only. They ignore costs and stop cheap trials that belong on the front; they are here
    for comparison.
    """

    def __init__(self, inner: BasePruner) -> None:
        self._inner = inner
        self._copy: optuna.study.Study | None = None
        self._open: list[int] = []

    @property
    def inner(self) -> BasePruner:
        """Optuna's pruner."""
        return self._inner

    def prune(self, study: optuna.study.Study, trial: FrozenTrial) -> bool:
        """Return the inner pruner's decision."""
        copy = self._follow(study)
        return bool(self._inner.prune(copy, copy.get_trials(deepcopy=False)[trial.number]))

    def _follow(self, study: optuna.study.Study) -> optuna.study.Study:
        """Update and return the copy. Its trials have the same numbers."""
        if self._copy is None:
            self._copy = optuna.create_study(
                study_name=study.study_name, direction=study.directions[0], pruner=self._inner
            )
        trials = study.get_trials(deepcopy=False)
        n_known = len(self._copy.get_trials(deepcopy=False))
        changed = [*self._open, *range(n_known, len(trials))]
        self._open = [number for number in changed if not trials[number].state.is_finished()]
        for _ in range(n_known, len(trials)):
            self._copy.ask()
        known = self._copy.get_trials(deepcopy=False)
        for trial, copied in ((trials[number], known[number]) for number in changed):
            for step, value in sorted(trial.intermediate_values.items()):
                if step not in copied.intermediate_values:
                    optuna.trial.Trial(self._copy, copied._trial_id).report(value, step)
                    if trial.state.is_finished():
                        # A trial of an earlier session: some pruners keep state per rung.
                        copied = self._copy.get_trials(deepcopy=False)[trial.number]
                        self._inner.prune(self._copy, copied)
            if trial.state == TrialState.COMPLETE:
                self._copy.tell(trial.number, (trial.values or [float("nan")])[0])
            elif trial.state.is_finished():
                self._copy.tell(trial.number, state=trial.state)
        return self._copy
