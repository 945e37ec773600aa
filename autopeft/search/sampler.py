"""The samplers of a search, as Optuna samplers: autopeft's own, and Optuna's by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from autopeft.errors import SettingsError, SpaceError
from autopeft.outcome import Objective
from autopeft.pricing import PriceTable
from autopeft.search.constraints import Constraint
from autopeft.search.proposer import Pricer, Seen, StratifiedProposer
from autopeft.search.pruner import PRICE_KEY
from autopeft.search.space import SearchSpace
from autopeft.search.study import distribution

_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}


class ProposerSampler(BaseSampler):
    """Lets a proposer choose all parameters of a trial at once.

    Works in any Optuna study whose trials carry their price in the user attribute "price".

    Args:
        space: The search space.
        proposer: Chooses the next point from the trials so far.
    """

    def __init__(self, space: SearchSpace, proposer: StratifiedProposer) -> None:
        self.space = space
        self.proposer = proposer
        self._distributions = {name: distribution(row) for name, row in space.parameters.items()}
        self._seen: dict[int, Seen] = {}

    def infer_relative_search_space(
        self, study: optuna.study.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All parameters of the space."""
        return self._distributions

    def sample_relative(
        self,
        study: optuna.study.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """The parameters of the proposed point: those it has."""
        genome = self.proposer.propose(self.history(study, trial.number))
        return self.space.codec.params(genome)

    def sample_independent(
        self,
        study: optuna.study.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A value for a parameter the proposed point has no use for."""
        lowest = {"step": getattr(param_distribution, "low", None)}["step"]
        return getattr(param_distribution, "choices", (lowest,))[0]

    def history(self, study: optuna.study.Study, excluded: int = -1) -> list[Seen]:
        """The study's trials as the proposer wants them."""
        rows = []
        for trial in study.get_trials(deepcopy=False):
            if trial.number == excluded or trial.state not in _STATES:
                continue
            seen = self._seen.get(trial.number)
            if seen is None:
                seen = self._read(trial, len(study.directions))
                if trial.state.is_finished():
                    self._seen[trial.number] = seen
            rows.append(seen)
        return rows

    def _read(self, trial: FrozenTrial, n_objectives: int) -> Seen:
        try:
            genome = self.space.codec.from_params(trial.params) if trial.params else None
        except SpaceError:
            genome = None
        values = trial.values if trial.state == TrialState.COMPLETE else None
        return Seen(
            genome,
            _STATES[trial.state],  # type: ignore[arg-type]
            tuple(values or [float("nan")] * n_objectives),
            trial.user_attrs.get(PRICE_KEY, {}),
            dict(trial.intermediate_values),
        )


class AutoPeftSampler(ProposerSampler):
    """The default sampler: spread over cost first, then expected gain of the front.

    Args:
        space: The search space.
        objectives: Quality first.
        prices: Prices candidates; None: from the shapes of the space's topology.
        constraints: Limits on prices.
        seed: Of the random numbers.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        prices: Pricer | None = None,
        constraints: Sequence[Constraint] = (),
        seed: int = 0,
    ) -> None:
        pricer = prices or PriceTable.from_topology(space.topology)
        super().__init__(space, StratifiedProposer(space, objectives, pricer, constraints, seed))


SAMPLERS: tuple[str, ...] = ("autopeft", "random")
"""Every sampler that has a name."""


def make_sampler(
    name: str | BaseSampler,
    space: SearchSpace,
    objectives: Sequence[Objective],
    prices: Pricer,
    constraints: Sequence[Constraint] = (),
    seed: int = 0,
) -> BaseSampler:
    """The sampler of that name.

    Raises:
        SettingsError: if there is none.
    """
    if isinstance(name, ProposerSampler):
        return name
    if name == "autopeft":
        return AutoPeftSampler(space, objectives, prices, constraints, seed)
    if name == "random":
        proposer = StratifiedProposer(space, objectives, prices, constraints, seed)
        return ProposerSampler(space, proposer)
    close = difflib.get_close_matches(str(name), SAMPLERS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(SAMPLERS)}"
    raise SettingsError("sampler", name, "no such sampler", hint)
