"""Checks a pruner: it decides in any order of reports, and never stops the best of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial

from autopeft.errors import SettingsError
from autopeft.searcher.controller import SearchController
from autopeft.searcher.pruners.registry import Rungs, make_pruner
from autopeft.searcher.pruners.single_objective import SingleObjectivePruner
from autopeft.testing.plain_space import plain_prices, plain_space
from autopeft.testing.requirement import Requirement
from autopeft.trial import Decision, Trial
from autopeft.utils.registry import describe

_STEPS = (3, 9, 27)
_N_TRIALS = 12
_OBJECTIVES = (
    ("loss",),
    ("accuracy", "trainable_params"),
    ("accuracy", "trainable_params", "train_flops"),
)
_ORDERS = ("one trial after the other", "all trials in turn", "at random")


def check_pruner(pruner: Any) -> None:
    """Check that a pruner can stop the trials of a search.

    In studies of one, two and three objectives, and for reports in any order, it returns True or
    False, the same again for the same reports. It never stops a trial that is best in quality and
    in every cost. One with `is_multi_objective = True`, which sees the costs, never stops the
    cheapest trial: none that costs no more is better.

    Args:
        pruner: The pruner, its class, a function of the rungs that makes it, or its name.

    Raises:
        AssertionError: if it does not; the message is one line.
        SettingsError: if it is no pruner.

    Example:
        >>> import optuna
        >>> from autopeft.testing import check_pruner
        >>> check_pruner("gap")
        >>> check_pruner(optuna.pruners.MedianPruner)
    """
    shown = pruner if isinstance(pruner, str) else describe(pruner).rpartition(":")[2]
    require = Requirement(f"pruner {shown}")
    for names in _OBJECTIVES:
        for order in _ORDERS:
            for is_best_cheapest in (True, False):
                first, again = (
                    _stopped(pruner, names, order, is_best_cheapest, require) for _ in range(2)
                )
                where = f"of {len(names)} objectives, reported {order}"
                text = f"decides differently on the same trials {where}; draw nothing at random"
                require.that(first.decisions == again.decisions, text)
                cheapest = (first.cheapest, Decision.STOP) in first.decisions
                what = "the cheapest and best" if is_best_cheapest else "the cheapest"
                text = f"stops {what} trial {where}; nothing that costs no more is better"
                is_promised = is_best_cheapest or (first.sees_costs and len(names) > 1)
                require.that(not (is_promised and cheapest), text)


@dataclass
class _Seen:
    """What a pruner did: the decision of each report, and which trial is the cheapest."""

    sees_costs: bool
    cheapest: int = 0
    decisions: list[tuple[int, Decision]] = field(default_factory=list)


class _Spied(BasePruner):
    """Checks what the pruner returns."""

    is_multi_objective = True

    def __init__(self, inner: BasePruner, require: Requirement) -> None:
        self._inner, self._require = inner, require

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        with self._require.no_error("prune"):
            answer = self._inner.prune(study, trial)
        is_bool = isinstance(answer, bool | np.bool_)
        self._require.that(is_bool, f"prune returns {answer!r}; return True or False")
        return bool(answer)


def _stopped(
    pruner: Any, objectives: Sequence[str], order: str, is_best_cheapest: bool, require: Requirement
) -> _Seen:
    """Run a search whose trials report what they cost, or how little they cost."""
    made = make_pruner(pruner, Rungs(_STEPS[0], _STEPS[-1]))
    controller = SearchController(
        plain_space(_STEPS[-1]),
        objectives,
        sampler="random",
        pruner=_Spied(made, require),
        prices=plain_prices(),
        study_name="check",  # Hyperband draws from the name.
    )
    trials = [trial for _ in range(_N_TRIALS) if (trial := controller.ask()) is not None]
    ranked = sorted(trials, key=lambda trial: trial.costs.trainable_params)
    seen = _Seen(not isinstance(made, SingleObjectivePruner), ranked[0].number)
    sign = controller.objectives[0].sign()
    places = {trial.number: place for place, trial in enumerate(ranked)}
    ended: set[int] = set()
    for trial, step in _reports(trials, order):
        if trial.number in ended:
            continue
        level = places[trial.number] / _N_TRIALS
        quality = (1.0 - level if is_best_cheapest else level) - 1.0 / step
        try:
            decision = controller.report(trial, step, sign * quality)
        except SettingsError as error:  # It wraps what the spy found.
            raise error.__cause__ or error from None
        seen.decisions.append((trial.number, decision))
        if decision is Decision.STOP:
            ended.add(trial.number)
        elif step == _STEPS[-1]:
            controller.tell(trial, score=sign * quality)
    return seen


def _reports(trials: Sequence[Trial], order: str) -> Iterator[tuple[Trial, int]]:
    """Yield each trial with each of its steps, a trial's steps in order."""
    if order == _ORDERS[0]:
        yield from ((trial, step) for trial in trials for step in _STEPS)
    elif order == _ORDERS[1]:
        yield from ((trial, step) for step in _STEPS for trial in trials)
    else:
        rng = np.random.default_rng(0)
        turns = rng.permutation([i for i in range(len(trials)) for _ in _STEPS])
        done = [0] * len(trials)
        for i in turns.tolist():
            yield trials[i], _STEPS[done[i]]
            done[i] += 1
