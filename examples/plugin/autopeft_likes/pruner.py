"""A pruner: stops a trial that cheaper ones leave far behind."""

import optuna
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial


class OutclassedPruner(BasePruner):
    """Stops a trial that three trials with fewer parameters beat at the same step."""

    is_multi_objective = True  # It reads the whole study; Optuna's own see the quality alone.

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether the trial should stop; never the cheapest one."""
        step = trial.last_step
        if step is None:
            return False
        sign = 1.0 if study.directions[0] == StudyDirection.MAXIMIZE else -1.0
        score = sign * trial.intermediate_values[step]
        better = [
            other
            for other in study.get_trials(deepcopy=False)
            if step in other.intermediate_values
            and sign * other.intermediate_values[step] > score
            and _n_params(other) < _n_params(trial)
        ]
        return len(better) >= 3


def _n_params(trial: FrozenTrial) -> float:
    return float(trial.user_attrs["price"]["trainable_params"])
