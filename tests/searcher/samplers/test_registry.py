"""A sampler is found by name, by path or as an object, and made for the problem of a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
import pytest

from autopeft.costs import PriceTable, Topology
from autopeft.costs.objectives import objective
from autopeft.errors import SettingsError
from autopeft.searcher.controller import SearchController
from autopeft.searcher.samplers.base import StratifiedSampler
from autopeft.searcher.samplers.bayesian import BayesianSampler
from autopeft.searcher.samplers.guarded import FallbackSampler, GuardedSampler
from autopeft.searcher.samplers.optuna_adapters import AutoPeftSampler, WrappedSampler, make_sampler
from autopeft.searcher.samplers.registry import BUILT_IN, SAMPLERS, Problem, register_sampler
from autopeft.searcher.space.encoding import Point
from autopeft.searcher.space.space import SearchSpace
from autopeft.trial import Trial

TOPOLOGY = Topology(2, {"attn.q": (64, 64), "attn.v": (64, 64)})
SPACE = SearchSpace.from_source({"methods": ["lora", "ia3"]}, TOPOLOGY)
OBJECTIVES = (objective("accuracy"), objective("trainable_params"))
PROBLEM = Problem(SPACE, OBJECTIVES, PriceTable.from_topology(TOPOLOGY), seed=3)


class Largest(StratifiedSampler):
    """Proposes the most expensive of some points."""

    def propose(self, trials: Sequence[Trial]) -> Point:
        points = [super(Largest, self).propose(trials) for _ in range(20)]
        return max(points, key=lambda point: self.space.n_params(point.options))


class Blind:
    """Has nothing but propose, which raises."""

    def propose(self, trials: Sequence[Trial]) -> Point:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("autopeft", BayesianSampler),
        ("random", StratifiedSampler),
        ("tpe", WrappedSampler),
        (optuna.samplers.NSGAIISampler(), WrappedSampler),
        (optuna.samplers.TPESampler, WrappedSampler),
        ("optuna.samplers:QMCSampler", WrappedSampler),
        (AutoPeftSampler(SPACE, OBJECTIVES), BayesianSampler),
        (Largest, Largest),
        (Largest(PROBLEM), Largest),
        (lambda problem: Largest(problem), Largest),
        (lambda problem: optuna.samplers.RandomSampler(seed=problem.seed), WrappedSampler),
    ],
)
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_whatever_can_be_a_sampler_is_made(value: Any, kind: type) -> None:
    made = make_sampler(value, PROBLEM)
    is_ours = value in BUILT_IN or isinstance(value, AutoPeftSampler)
    assert isinstance(made, FallbackSampler if is_ours else GuardedSampler)
    assert type(made.inner) is kind


def test_a_class_of_optunas_gets_the_seed() -> None:
    first, again = (make_sampler(optuna.samplers.RandomSampler, PROBLEM) for _ in range(2))
    assert first.propose(()).key == again.propose(()).key


def test_a_registered_one_proposes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SAMPLERS, "_items", dict(SAMPLERS._items))
    register_sampler("largest", Largest)
    sizes = {}
    for name in ("largest", "random"):
        controller = SearchController(
            SPACE, OBJECTIVES, sampler=name, n_baselines=0, n_portfolio=0, seed=1
        )
        sizes[name] = sum(controller.ask().costs.trainable_params for _ in range(8))
    assert sizes["largest"] > sizes["random"]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("tpo", "sampler='tpo': no such sampler; did you mean 'tpe'"),
        ("optuna.samplers:GridSampler", "cannot be made"),
        (3, "must be a sampler of Optuna or autopeft"),
        (lambda problem: 3, "int has no propose"),
    ],
)
def test_what_is_none_is_refused_in_one_line(value: Any, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem) as caught:
        make_sampler(value, PROBLEM)
    assert "\n" not in str(caught.value)


def test_a_sampler_that_fails_is_named_and_a_cost_that_fails_too() -> None:
    blind: Any = make_sampler(Blind(), PROBLEM)
    assert blind.origin == "search"
    assert blind.propose_baseline((), ["first", "second"]) == "first"
    with pytest.raises(SettingsError, match=r"sampler=.*Blind.*propose fails \(NotImplemented"):
        blind.propose(())

    class Wrong:
        def propose(self, trials: Sequence[Trial]) -> Any:
            return "a plan"

    with pytest.raises(SettingsError, match="propose returned a str, not a Point"):
        make_sampler(Wrong(), PROBLEM).propose(())

    def priced(problem: Problem) -> Any:
        raise SettingsError("cost", "mine", "its function fails", "correct the function")

    with pytest.raises(SettingsError, match=r"^cost='mine': its function fails"):
        make_sampler(priced, PROBLEM)
