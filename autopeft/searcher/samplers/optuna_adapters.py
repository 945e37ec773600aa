"""Samplers across the border to Optuna: ours in any Optuna study, Optuna's in our search."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from autopeft.costs import Price, PriceTable
from autopeft.costs.constraints import Constraint
from autopeft.costs.objectives import Objective, Pricer
from autopeft.errors import SettingsError, SpaceError
from autopeft.searcher.pruners.gap import PRICE_KEY
from autopeft.searcher.samplers.base import Sampler, StratifiedSampler
from autopeft.searcher.samplers.bayesian import BayesianSampler
from autopeft.searcher.samplers.budget_first import BudgetFirstEncoding, PlainEncoding
from autopeft.searcher.samplers.guarded import FallbackSampler, GuardedSampler
from autopeft.searcher.samplers.registry import BUILT_IN, KINDS, SAMPLERS, Problem, is_sampler
from autopeft.searcher.samplers.warm_start import WarmStart
from autopeft.searcher.space.encoding import Point, PointKey
from autopeft.searcher.space.space import SearchSpace
from autopeft.searcher.study import PLAN_KEY, STATES, distribution, read_trial
from autopeft.trial import Trial
from autopeft.utils.extremes import bounded
from autopeft.utils.registry import blamed, describe
from autopeft.utils.serialize import to_plain

_MAX_REPEATS = 30
"""Known points that an Optuna sampler may propose in a row before the fallback is used."""


class OptunaAdapter(BaseSampler):
    """Runs a `Sampler` as the sampler of any Optuna study.

    Trials should have their price in the user attribute "price"; else they are priced.

    Args:
        space: The search space.
        objectives: Quality first.
        pricer: Prices candidates.
        sampler: Proposes the points.
    """

    def __init__(
        self, space: SearchSpace, objectives: Sequence[Objective], pricer: Pricer, sampler: Sampler
    ) -> None:
        self.space = space
        self.objectives = tuple(objectives)
        self.pricer = pricer
        self.sampler = sampler
        self._distributions = {name: distribution(row) for name, row in space.parameters.items()}
        self._trials: dict[int, Trial] = {}

    def infer_relative_search_space(
        self, study: optuna.study.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return all parameters of the space."""
        return self._distributions

    def sample_relative(
        self,
        study: optuna.study.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """Return the parameters of the proposed point."""
        for other in study.get_trials(deepcopy=False):
            known = self._trials.get(other.number)
            is_new = known is None or known.state == "running"
            if is_new and other.number != trial.number and other.state in STATES:
                self._read(other, study)
        return self.space.encoder.to_params(self.sampler.propose(list(self._trials.values())))

    def sample_independent(
        self,
        study: optuna.study.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return any value for a parameter that the proposed point does not have."""
        lowest = getattr(param_distribution, "low", None)
        return getattr(param_distribution, "choices", (lowest,))[0]

    def _read(self, frozen: FrozenTrial, study: optuna.study.Study) -> None:
        """Keep a trial, unless its parameters are not of this space."""
        if PLAN_KEY in frozen.user_attrs:
            self._trials[frozen.number] = read_trial(frozen, self.objectives, study=study)
        elif frozen.params:
            try:
                candidate = self.space.decode(frozen.params)
            except SpaceError:
                return
            known = frozen.user_attrs.get(PRICE_KEY, {})
            costs = Price(**{**to_plain(self.pricer.price(candidate)), **known})
            self._trials[frozen.number] = read_trial(
                frozen, self.objectives, candidate, costs, study=study
            )


class AutoPeftSampler(OptunaAdapter):
    """The default sampler of autopeft, for any Optuna study.

    Args:
        space: The search space.
        objectives: Quality first.
        prices: Prices candidates; None for prices computed from the space's topology.
        constraints: Limits on prices.
        seed: Random seed.
        warm_start: Trials of an earlier search on other data.

    Example:
        >>> topology = autopeft.Topology(2, {"attn.q": (64, 64), "attn.v": (64, 64)})
        >>> space = autopeft.SearchSpace.from_source({"methods": ["lora", "ia3"]}, topology)
        >>> objectives = [autopeft.Objective("accuracy", "maximize")]
        >>> sampler = autopeft.AutoPeftSampler(space, objectives, seed=0)
        >>> import optuna
        >>> study = optuna.create_study(sampler=sampler, direction="maximize")
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        prices: Pricer | None = None,
        constraints: Sequence[Constraint] = (),
        seed: int = 0,
        warm_start: WarmStart | None = None,
    ) -> None:
        pricer = prices or PriceTable.from_topology(space.topology, prompt_sizes=space.prompt_sizes)
        problem = Problem(space, tuple(objectives), pricer, tuple(constraints), seed, warm_start)
        sampler = FallbackSampler("autopeft", BayesianSampler(problem), StratifiedSampler(problem))
        super().__init__(space, objectives, pricer, sampler)


class WrappedSampler:
    """Runs one of Optuna's samplers as a `Sampler`, on parameters that suit it.

    It samples from a scratch study in memory that holds the same trials. If it proposes a known
    point again, the scratch study gets that point's values at once.

    Args:
        encoding: The parameters: plain ones, or budget first.
        inner: Optuna's sampler.
        fallback: Proposes points when the sampler repeats known ones.
    """

    def __init__(
        self, encoding: PlainEncoding, inner: BaseSampler, fallback: StratifiedSampler
    ) -> None:
        self.origin = "search"
        self._objectives = fallback.objectives
        self._limits = [limit for limit in fallback.constraints if limit.is_measured]
        self._encoding = encoding
        self._fallback = fallback
        self._distributions = {name: distribution(r) for name, r in encoding.parameters.items()}
        self._history = fallback.history
        self._inner = inner
        self._proposed: dict[PointKey, int] = {}
        self._n_followed = 0
        self._told: set[PointKey] = set()

    @cached_property
    def _scratch(self) -> optuna.study.Study:
        directions = [objective.direction for objective in self._objectives]
        return optuna.create_study(directions=directions, sampler=self._inner)

    def propose(self, trials: Sequence[Trial]) -> Point:
        """Return a new point."""
        self._history.update(trials)
        self._follow()
        for _ in range(_MAX_REPEATS):
            inside = self._scratch.ask(self._distributions)
            point = self._encoding.decode(inside.params)
            index = self._history.latest.get(point.key)
            if index is None:
                self._proposed[point.key] = inside.number
                return point
            self._tell(inside.number, point.key, self._history.trials[index])
        return self._fallback.propose(trials)

    def propose_baseline(self, trials: Sequence[Trial], choices: Sequence[Point]) -> Point:
        """Return the fallback's choice."""
        return self._fallback.propose_baseline(trials, choices)

    def _follow(self) -> None:
        """Tell the scratch study what happened since the last proposal."""
        history = self._history
        for key, number in list(self._proposed.items()):
            index = history.latest.get(key)
            if index is None:
                # The proposal was rejected, because it broke a constraint.
                self._tell_pruned(number)
            elif history.trials[index].state != "running":
                self._tell(number, key, history.trials[index])
            else:
                continue
            del self._proposed[key]
        for index in history.ended[self._n_followed :]:
            trial, point = history.trials[index], history.points[index]
            if point is not None and point.key not in self._told and trial.state == "complete":
                self._scratch.add_trial(
                    create_trial(
                        params=self._encoding.encode(point),
                        distributions=self._distributions,
                        values=self._values(trial),
                        constraints=self._excess(trial),
                    )
                )
        self._n_followed = len(history.ended)

    def _tell(self, number: int, key: PointKey, trial: Trial) -> None:
        if trial.state == "complete":
            for name, excess in self._excess(trial).items():
                self._constrain(number, name, excess)
            self._scratch.tell(number, self._values(trial))
        elif trial.state == "pruned":
            self._tell_pruned(number)
        else:
            self._scratch.tell(number, state=TrialState.FAIL)
        self._told.add(key)

    def _tell_pruned(self, number: int) -> None:
        if len(self._objectives) == 1:
            self._scratch.tell(number, state=TrialState.FAIL)
            return
        self._constrain(number, "pruned", 1.0)
        self._scratch.tell(number, state=TrialState.PRUNED)

    def _constrain(self, number: int, name: str, value: float) -> None:
        trial = self._scratch.get_trials(deepcopy=False)[number]
        optuna.trial.Trial(self._scratch, trial._trial_id).set_constraint(name, value)

    def _excess(self, trial: Trial) -> dict[str, float]:
        """Return by how much a complete trial is above each limit on a measured value."""
        return {limit.text: limit.excess(trial.measured) for limit in self._limits}

    def _values(self, trial: Trial) -> list[float]:
        return [float(v) for v in bounded([trial.values[o.name] for o in self._objectives])]


def tpe(problem: Problem) -> WrappedSampler:
    """Return Optuna's TPE on the total cost and the shares of it."""
    fallback = StratifiedSampler(problem)
    head, log_range = problem.space.topology.head_params, fallback.log_cost_range()
    encoding = BudgetFirstEncoding(problem.space.encoder, head, log_range)
    return WrappedSampler(encoding, TPESampler(seed=problem.seed), fallback)


def nsga2(problem: Problem) -> BaseSampler:
    """Return Optuna's NSGA-II."""
    return NSGAIISampler(population_size=20, seed=problem.seed)


def gp(problem: Problem) -> BaseSampler:
    """Return Optuna's Gaussian process."""
    # It imports torch, here and nowhere else in the searcher.
    return optuna.samplers.GPSampler(seed=problem.seed)


def make_sampler(value: Any, problem: Problem) -> Sampler:
    """Return the sampler that a setting's value stands for.

    Args:
        value: A name, `package.module:name`, or whatever can be registered.
        problem: What it proposes points for.

    Raises:
        SettingsError: if there is no such sampler, or it cannot be made.
    """
    made = SAMPLERS.resolve("sampler", value)
    shown = value if isinstance(value, str) else describe(value)
    if isinstance(made, type) or not is_sampler(made):
        with blamed("sampler", shown, "cannot be made", f"give {KINDS}"):
            made = _made(made, problem)
    if isinstance(made, OptunaAdapter):
        return made.sampler
    if isinstance(made, BaseSampler):
        encoding = PlainEncoding(problem.space.encoder)
        made = WrappedSampler(encoding, made, StratifiedSampler(problem))
    if not callable(getattr(made, "propose", None)):
        reason = f"{describe(made)} has no propose"
        remedy = "give it the members of autopeft.searcher.samplers.base.Sampler"
        raise SettingsError("sampler", shown, reason, remedy)
    is_ours = isinstance(made, StratifiedSampler) and type(made).__module__.startswith("autopeft.")
    if is_ours or shown in BUILT_IN:
        return FallbackSampler(shown, made, StratifiedSampler(problem))
    return GuardedSampler(shown, made)


def _made(part: Any, problem: Problem) -> Any:
    """Call what makes a sampler: Optuna's classes know no problem."""
    if not (isinstance(part, type) and issubclass(part, BaseSampler)):
        return part(problem)
    takes_seed = "seed" in inspect.signature(part).parameters
    make: Any = part
    return make(seed=problem.seed) if takes_seed else make()
