"""Reports and early stops in studies with several objectives, for Optuna's own users.

Optuna's `Trial.report` and `Trial.should_prune` raise NotImplementedError in such studies.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

from optuna.exceptions import TrialPruned
from optuna.pruners import NopPruner
from optuna.trial import Trial

from autopeft.errors import UserError
from autopeft.searcher.pruners.gap import GapPruner
from autopeft.utils.serialize import to_float

F = TypeVar("F", bound=Callable[..., Any])

PRUNED = "pruned"
"""Name of the constraint that a pruned trial of several objectives breaks."""


def prunable(objective: F) -> F:
    """Make `trial.report` and `trial.should_prune` work in studies with several objectives.

    A decorator of the objective. It also lets the samplers learn from a pruned trial: where there
    are several objectives, a trial that ends with `optuna.TrialPruned` gets a constraint "pruned"
    that it breaks. Without it, Optuna's TPE looks for the study's one direction, and raises.

    Args:
        objective: A function or method that takes a trial, perhaps among other arguments.

    Example:
        >>> import optuna
        >>> @autopeft.prunable
        ... def objective(trial):
        ...     size = trial.suggest_int("size", 1, 9)
        ...     trial.set_user_attr("price", {"size": size})
        ...     for step in range(20):
        ...         trial.report(size * step, step)
        ...         if trial.should_prune():
        ...             raise optuna.TrialPruned
        ...     return size * step, size
        >>> directions = ["maximize", "minimize"]
        >>> study = optuna.create_study(directions=directions, pruner=autopeft.GapPruner())
        >>> study.optimize(objective, n_trials=5)
        >>> len(study.trials)
        5
    """

    @functools.wraps(objective)
    def run(*args: Any, **kwargs: Any) -> Any:
        known = [_prunable(value) for value in args]
        named = {name: _prunable(value) for name, value in kwargs.items()}
        try:
            return objective(*known, **named)
        except TrialPruned:
            for value in (*known, *named.values()):
                if isinstance(value, PrunableTrial):
                    value.mark_pruned()
            raise

    return cast(F, run)


def _prunable(value: Any) -> Any:
    # A FixedTrial has no study; its own report and should_prune do nothing.
    return PrunableTrial(value) if isinstance(value, Trial) else value


class PrunableTrial(Trial):
    """A trial that reports and can be pruned, however many objectives its study has.

    For code that asks and tells; `prunable` is simpler for `study.optimize`.

    Args:
        trial: A running trial.

    Example:
        >>> import optuna
        >>> directions = ["maximize", "minimize"]
        >>> study = optuna.create_study(directions=directions, pruner=autopeft.GapPruner())
        >>> trial = autopeft.PrunableTrial(study.ask())
        >>> trial.set_user_attr("price", {"seconds": 3.0})
        >>> trial.report(0.7, step=1)
        >>> if trial.should_prune():
        ...     trial.mark_pruned()
        ...     study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        ... else:
        ...     frozen = study.tell(trial, [0.8, 3.0])
    """

    def __init__(self, trial: Trial) -> None:
        # Trial's own __init__ would begin it a second time.
        vars(self).update(vars(trial))
        self._gap = 1.0

    def report(self, value: float, step: int) -> None:
        """Store the quality after a step.

        Raises:
            UserError: if the value is no number, or steps come out of order.
        """
        number = to_float(value)
        if number is None:
            raise UserError("value", value, "must be a number", "report one")
        whole = to_float(step)
        if whole is None or whole != whole // 1 or whole < 0:
            raise UserError("step", step, "must be a whole number from 0", "report one")
        last = max(self._cached_frozen_trial.intermediate_values, default=-1)
        if whole <= last:
            raise UserError("step", step, f"comes after step {last}", "report steps in order")
        self.storage.set_trial_intermediate_value(self._trial_id, int(whole), number)
        self._cached_frozen_trial.intermediate_values[int(whole)] = number

    def should_prune(self) -> bool:
        """Return whether the study's pruner would stop the trial now.

        Raises:
            UserError: if the pruner handles one objective only, or lacks the trial's costs.
        """
        pruner, trial = self.study.pruner, self._get_latest_trial()
        if len(self.study.directions) == 1 or isinstance(pruner, NopPruner):
            return bool(pruner.prune(self.study, trial))
        if not getattr(pruner, "is_multi_objective", False):
            name = type(pruner).__name__
            problem = "handles one objective, but the study has several"
            raise UserError("pruner", name, problem, "create it with pruner=autopeft.GapPruner()")
        if not isinstance(pruner, GapPruner):
            return bool(pruner.prune(self.study, trial))
        gap = pruner.gap(self.study, trial)
        self._gap = gap if 0 < gap < math.inf else 1.0
        return gap > 0

    def mark_pruned(self) -> None:
        """Let samplers see a trial of several objectives as one that breaks a constraint."""
        is_marked = PRUNED in self._cached_frozen_trial.constraints
        if len(self.study.directions) > 1 and not is_marked:
            self.set_constraint(PRUNED, self._gap)
