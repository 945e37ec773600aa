"""Every sampler that a setting may name: ours, Optuna's, installed and a user's own.

Optuna is imported when a sampler is made, so that a mistaken name is told before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, overload

from autopeft.utils.registry import Registry

if TYPE_CHECKING:
    from autopeft.costs.constraints import Constraint
    from autopeft.costs.objectives import Objective, Pricer
    from autopeft.searcher.samplers.warm_start import WarmStart
    from autopeft.searcher.space.space import SearchSpace

F = TypeVar("F")


@dataclass(frozen=True)
class Problem:
    """What a sampler proposes points for.

    Attributes:
        space: The search space.
        objectives: Quality first.
        prices: Prices candidates.
        constraints: Limits on prices.
        seed: Random seed.
        warm_start: Trials of an earlier search on other data.
    """

    space: SearchSpace
    objectives: tuple[Objective, ...]
    prices: Pricer
    constraints: tuple[Constraint, ...] = ()
    seed: int = 0
    warm_start: WarmStart | None = None


KINDS = "a sampler of Optuna or autopeft, its class, or a function of the problem that returns one"
"""What can be a sampler, for messages."""


def is_sampler(part: Any) -> bool:
    """Return whether an object or class has the methods of autopeft's or of Optuna's samplers."""
    return any(callable(getattr(part, name, None)) for name in ("propose", "sample_relative"))


def _as_sampler(_name: str, part: Any) -> Any:
    if not is_sampler(part) and (isinstance(part, type) or not callable(part)):
        raise TypeError(f"must be {KINDS}")
    return part


SAMPLERS: Registry[Any] = Registry(
    "sampler", "autopeft.samplers", __name__, _as_sampler, keeps_given=False, is_carried=False
)
"""Every sampler: the sampler itself, its class, or a function that makes it."""


@overload
def register_sampler(name: str, sampler: None = None) -> Callable[[F], F]: ...
@overload
def register_sampler(name: str, sampler: F) -> F: ...
@overload
def register_sampler(name: F) -> F: ...
def register_sampler(name: Any, sampler: Any = None) -> Any:
    """Register a sampler, so that the setting `sampler` can name it.

    A call, or a decorator. A package offers one with an entry point of the group
    `autopeft.samplers`.

    Args:
        name: Its name in settings; as a bare decorator, that of the class or function.
        sampler: An Optuna sampler, which then works on the plain parameters of the space; an
            object with the methods of `autopeft.searcher.samplers.base.Sampler`; a class of
            either; or a function that returns one. A function, and a class of autopeft's kind, is
            given the problem: its `space`, `objectives`, `prices`, `constraints`, `seed` and
            `warm_start`. A class of Optuna's is given the seed if it takes one. Or where it is
            found, as `module:name`.

    Returns:
        The sampler, class or function, or a decorator.

    Raises:
        SettingsError: if the name stands for another sampler.

    Example:
        >>> import optuna
        >>> @autopeft.register_sampler
        ... def small_steps(problem):
        ...     return optuna.samplers.NSGAIISampler(mutation_prob=0.05, seed=problem.seed)
        >>> topology = autopeft.Topology(2, {"attn.q": (64, 64), "attn.v": (64, 64)})
        >>> space = autopeft.SearchSpace.from_source({"methods": ["lora"]}, topology)
        >>> controller = autopeft.SearchController(space, ["accuracy"], sampler="small_steps")
    """
    return SAMPLERS.door(name, sampler)


register_sampler("autopeft", "autopeft.searcher.samplers.bayesian:BayesianSampler")
register_sampler("random", "autopeft.searcher.samplers.base:StratifiedSampler")
for _name in ("tpe", "nsga2", "gp"):
    register_sampler(_name, f"autopeft.searcher.samplers.optuna_adapters:{_name}")

BUILT_IN = SAMPLERS.registered
"""Names of the samplers that come with autopeft."""
