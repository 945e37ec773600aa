"""Every pruner that a setting may name: ours, Optuna's, installed and a user's own.

Optuna is imported when a pruner is made, so that a mistaken name is told before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, overload

from autopeft.errors import SettingsError
from autopeft.utils.registry import Registry, blamed, describe

if TYPE_CHECKING:
    from optuna.pruners import BasePruner

F = TypeVar("F")


@dataclass(frozen=True)
class Rungs:
    """When the trials of a search report.

    Attributes:
        first: Steps at the first rung.
        last: Steps of a whole training.
        eta: Ratio between rungs.
        further: Names of the objectives that are qualities beside the reported one.
        costs: Names of the costs that trials are compared by, if these are not the objectives: a
            measured one with a limit is among them. None: the objectives.
        limits: Names of the constraints of trials that limit what they are not compared by. A
            complete trial that breaks one stops no others.
    """

    first: int = 1
    last: int = 100
    eta: float = 3.0
    further: tuple[str, ...] = ()
    costs: tuple[str, ...] | None = None
    limits: tuple[str, ...] = ()


_KINDS = "a pruner of Optuna, its class, or a function of the search's rungs that returns one"


def _as_pruner(_name: str, part: Any) -> Any:
    if not _is_pruner(part) and (isinstance(part, type) or not callable(part)):
        raise TypeError(f"must be {_KINDS}")
    return part


def _is_pruner(part: Any) -> bool:
    return callable(getattr(part, "prune", None))


PRUNERS: Registry[Any] = Registry(
    "pruner", "autopeft.pruners", __name__, _as_pruner, keeps_given=False, is_carried=False
)
"""Every pruner: the pruner itself, its class, or a function that makes it."""


@overload
def register_pruner(name: str, pruner: None = None) -> Callable[[F], F]: ...
@overload
def register_pruner(name: str, pruner: F) -> F: ...
@overload
def register_pruner(name: F) -> F: ...
def register_pruner(name: Any, pruner: Any = None) -> Any:
    """Register a pruner, so that the setting `pruner` can name it.

    A call, or a decorator. A package offers one with an entry point of the group
    `autopeft.pruners`.

    A pruner that reads one direction only, as Optuna's do, sees the quality. One with the attribute
    `is_multi_objective = True` sees the study itself, with the prices of its trials in the user
    attribute "price".

    Args:
        name: Its name in settings; as a bare decorator, that of the class or function.
        pruner: An Optuna pruner, a class that is made without arguments, or a function that
            returns one and is given when trials report: `rungs.first`, `rungs.last` and
            `rungs.eta`. Or where it is found, as `module:name`.

    Returns:
        The pruner, class or function, or a decorator.

    Raises:
        SettingsError: if the name stands for another pruner.

    Example:
        >>> import optuna
        >>> @autopeft.register_pruner
        ... def late_median(rungs):
        ...     return optuna.pruners.MedianPruner(n_warmup_steps=rungs.last // 4)
        >>> topology = autopeft.Topology(2, {"attn.q": (64, 64), "attn.v": (64, 64)})
        >>> space = autopeft.SearchSpace.from_source({"methods": ["lora"]}, topology)
        >>> controller = autopeft.SearchController(space, ["accuracy"], pruner="late_median")
    """
    return PRUNERS.door(name, pruner)


register_pruner("gap", "autopeft.searcher.pruners.gap:gap_pruner")
for _name in ("none", "median", "percentile", "asha", "hyperband"):
    register_pruner(_name, f"autopeft.searcher.pruners.optuna_pruners:{_name}")


def make_pruner(value: Any, rungs: Rungs) -> BasePruner:
    """Return the pruner that a setting's value stands for, for studies with several directions.

    Args:
        value: A name, `package.module:name`, or whatever can be registered.
        rungs: When trials report.

    Raises:
        SettingsError: if there is no such pruner, or it cannot be made.
    """
    from autopeft.searcher.pruners.single_objective import SingleObjectivePruner

    made = PRUNERS.resolve("pruner", value)
    shown = value if isinstance(value, str) else describe(value)
    if isinstance(made, type) or not _is_pruner(made):
        with blamed("pruner", shown, "cannot be made", f"give {_KINDS}"):
            made = made() if isinstance(made, type) else made(rungs)
    if not _is_pruner(made):
        problem = f"returned {describe(made)} without prune(study, trial)"
        raise SettingsError("pruner", shown, problem, f"give {_KINDS}")
    is_ready = getattr(made, "is_multi_objective", False)
    return made if is_ready else SingleObjectivePruner(made)
