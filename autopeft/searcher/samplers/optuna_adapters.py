"""The samplers of a search, as Optuna samplers: autopeft's own, and Optuna's by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from autopeft.costs import PriceTable
from autopeft.costs.constraints import Constraint
from autopeft.costs.objectives import Objective
from autopeft.errors import SettingsError, SpaceError
from autopeft.searcher.pruner import PRICE_KEY
from autopeft.searcher.samplers.base import Pricer, Sampler, Seen, StratifiedSampler
from autopeft.searcher.samplers.bayesian import BayesianSampler
from autopeft.searcher.samplers.budget_first import BudgetFirstEncoding, PlainEncoding
from autopeft.searcher.samplers.warm_start import Prior
from autopeft.searcher.space.encoding import Point
from autopeft.searcher.space.space import SearchSpace
from autopeft.searcher.study import STATES, distribution
from autopeft.utils.serialize import nearest

_N_REPEATS = 30
"""Proposals of known points a stock sampler is forgiven before the fallback draws."""


class OptunaAdapter(BaseSampler):
    """Lets a proposer choose all parameters of a trial at once.

    Works in any Optuna study whose trials carry their price in the user attribute "price".

    Args:
        space: The search space.
        proposer: Chooses the next point from the trials so far.
    """

    def __init__(self, space: SearchSpace, proposer: Sampler) -> None:
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
        point = self.proposer.propose(self.history(study, trial.number))
        return self.space.encoder.to_params(point)

    @property
    def origin(self) -> str:
        """Where the last proposal came from: "design" or "search"."""
        return self.proposer.origin

    def propose_baseline(self, study: optuna.study.Study, choices: Sequence[Point]) -> Point:
        """Which of some LoRA baselines to try next."""
        return self.proposer.propose_baseline(self.history(study), choices)

    def sample_independent(
        self,
        study: optuna.study.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A value for a parameter the proposed point has no use for."""
        lowest = getattr(param_distribution, "low", None)
        return getattr(param_distribution, "choices", (lowest,))[0]

    def history(self, study: optuna.study.Study, excluded: int = -1) -> list[Seen]:
        """The study's trials as the proposer wants them."""
        rows = []
        for trial in study.get_trials(deepcopy=False):
            if trial.number == excluded or trial.state not in STATES:
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
            point = self.space.encoder.from_params(trial.params) if trial.params else None
        except SpaceError:
            point = None
        values = trial.values if trial.state == TrialState.COMPLETE else None
        return Seen(
            point,
            STATES[trial.state],
            tuple(values or [float("nan")] * n_objectives),
            trial.user_attrs.get(PRICE_KEY, {}),
            dict(trial.intermediate_values),
            str(trial.user_attrs.get("origin", "search")),
        )


class AutoPeftSampler(OptunaAdapter):
    """The default sampler: spread over cost first, then expected gain of the front.

    Args:
        space: The search space.
        objectives: Quality first.
        prices: Prices candidates; None: from the shapes of the space's topology.
        constraints: Limits on prices.
        seed: Of the random numbers.
        prior: What an earlier search found on other data.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        prices: Pricer | None = None,
        constraints: Sequence[Constraint] = (),
        seed: int = 0,
        prior: Prior | None = None,
    ) -> None:
        pricer = prices or PriceTable.from_topology(space.topology, prompt_sizes=space.prompt_sizes)
        proposer = BayesianSampler(space, objectives, pricer, constraints, seed, prior=prior)
        super().__init__(space, proposer)


class WrappedSampler(OptunaAdapter):
    """One of Optuna's own samplers, fed with parameters that suit it.

    It works on a scratch study in memory, which holds the same trials under its parameters. There a
    point proposed twice is told its known values at once, so that the sampler goes on as if it had
    been trained again.

    Args:
        space: The search space.
        coding: Its parameters for this sampler: plain, or the total cost first.
        inner: Optuna's sampler.
        fallback: Draws when the sampler keeps proposing what is known.
    """

    def __init__(
        self,
        space: SearchSpace,
        coding: PlainEncoding | BudgetFirstEncoding,
        inner: BaseSampler,
        fallback: Sampler,
    ) -> None:
        super().__init__(space, fallback)
        self._coding = coding
        self._inner = inner
        self._inside = {name: distribution(row) for name, row in coding.parameters().items()}
        self._scratch: optuna.study.Study | None = None
        self._open: dict[Any, int] = {}
        self._followed: set[int] = set()
        self._told: set[Any] = set()

    def sample_relative(
        self,
        study: optuna.study.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """The parameters of a new point, as the space's own encoder writes them."""
        history = self.history(study, trial.number)
        known = {seen.point.key: seen for seen in history if seen.point is not None}
        scratch = self._follow(study, known)
        for _ in range(_N_REPEATS):
            inside = scratch.ask(self._inside)
            point = self._coding.decode(inside.params)
            seen = known.get(point.key)
            if seen is None:
                self._open[point.key] = inside.number
                return self.space.encoder.to_params(point)
            self._tell(inside.number, seen)
        return self.space.encoder.to_params(self.proposer.propose(history))

    def _follow(self, study: optuna.study.Study, known: Mapping[Any, Seen]) -> optuna.study.Study:
        """The scratch study with everything that ended since told to it."""
        if self._scratch is None:
            self._scratch = optuna.create_study(directions=study.directions, sampler=self._inner)
        for key, number in list(self._open.items()):
            seen = known.get(key)
            if seen is None:
                # Proposed but refused: it broke a constraint.
                self._tell(number, Seen(None, "pruned", (), {}))
            elif seen.state != "running":
                self._tell(number, seen)
            else:
                continue
            del self._open[key]
        for trial in study.get_trials(deepcopy=False):
            if trial.number in self._followed or not trial.state.is_finished():
                continue
            self._followed.add(trial.number)
            seen = self._seen.get(trial.number)
            if seen is None or seen.point is None or seen.point.key in self._told:
                continue
            if seen.state == "complete":
                self._scratch.add_trial(
                    create_trial(
                        params=self._coding.encode(seen.point),
                        distributions=self._inside,
                        values=list(seen.objectives),
                    )
                )
        return self._scratch

    def _tell(self, number: int, seen: Seen) -> None:
        assert self._scratch is not None
        if seen.state == "complete":
            self._scratch.tell(number, list(seen.objectives))
        elif seen.state == "pruned" and len(self._scratch.directions) > 1:
            trial = self._scratch.get_trials(deepcopy=False)[number]
            optuna.trial.Trial(self._scratch, trial._trial_id).set_constraint("pruned", 1.0)
            self._scratch.tell(number, state=TrialState.PRUNED)
        else:
            self._scratch.tell(number, state=TrialState.FAIL)
        if seen.point is not None:
            self._told.add(seen.point.key)


SAMPLERS: tuple[str, ...] = ("autopeft", "tpe", "nsga2", "gp", "random")
"""Every sampler that has a name."""


def make_sampler(
    name: str | BaseSampler,
    space: SearchSpace,
    objectives: Sequence[Objective],
    prices: Pricer,
    constraints: Sequence[Constraint] = (),
    seed: int = 0,
    prior: Prior | None = None,
) -> BaseSampler:
    """The sampler of that name.

    Args:
        name: One of `SAMPLERS`, a `OptunaAdapter`, or any sampler of Optuna's, which then works
            on the plain parameters.
        space: The search space.
        objectives: Quality first.
        prices: Prices candidates.
        constraints: Limits on prices.
        seed: Of the random numbers.
        prior: What an earlier search found; only "autopeft" makes use of it.

    Raises:
        SettingsError: if there is none.
    """
    if isinstance(name, OptunaAdapter):
        return name
    if name == "autopeft":
        return AutoPeftSampler(space, objectives, prices, constraints, seed, prior)
    fallback = StratifiedSampler(space, objectives, prices, constraints, seed)
    if name == "random":
        return OptunaAdapter(space, fallback)
    plain = PlainEncoding(space.encoder)
    if isinstance(name, BaseSampler):
        return WrappedSampler(space, plain, name, fallback)
    if name == "tpe":
        coding = BudgetFirstEncoding(
            space.encoder, space.topology.head_params, fallback.log_cost_range()
        )
        return WrappedSampler(space, coding, optuna.samplers.TPESampler(seed=seed), fallback)
    if name == "nsga2":
        inner = optuna.samplers.NSGAIISampler(population_size=20, seed=seed)
        return WrappedSampler(space, plain, inner, fallback)
    if name == "gp":
        # Optuna's own needs torch, which is loaded here and only here.
        return WrappedSampler(space, plain, optuna.samplers.GPSampler(seed=seed), fallback)
    raise SettingsError("sampler", name, "no such sampler", nearest(str(name), SAMPLERS))
