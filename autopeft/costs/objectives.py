"""The objectives of a search: a quality, and the costs and further qualities beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, overload

from autopeft.errors import SettingsError
from autopeft.utils.registry import Registry, blamed

if TYPE_CHECKING:
    from autopeft.costs.price import Price
    from autopeft.plan import AdapterPlan, Candidate

F = TypeVar("F")
Direction = Literal["maximize", "minimize"]

UNBOUNDED = (-math.inf, math.inf)


@dataclass(frozen=True)
class Objective:
    """One thing to optimize.

    Attributes:
        name: As written in `front.json`.
        direction: "maximize" or "minimize".
        unit: For people; empty for a pure number.
        is_known: True if the value is known before training, from the price.
        bounds: Its least and its largest possible value, as far as they are known.

    Example:
        >>> autopeft.Objective("perplexity", "minimize").sign()
        -1.0
    """

    name: str
    direction: Direction
    unit: str = ""
    is_known: bool = False
    bounds: tuple[float, float] = UNBOUNDED

    def sign(self) -> float:
        """+1 where larger is better, -1 where smaller is."""
        return 1.0 if self.direction == "maximize" else -1.0

    @property
    def is_cost(self) -> bool:
        """Whether it is made of parts of the plan. Else it is a quality: only training tells it."""
        return self.is_known


CostFunction = Callable[["Price", "AdapterPlan"], float]

COST_PROXIES: Mapping[str, str] = {"train_seconds": "train_flops", "latency_ms": "inference_flops"}
"""Cost that is only measured -> known cost that is roughly proportional to it."""


@dataclass(frozen=True)
class Cost(Objective):
    """A cost to minimize.

    Attributes:
        function: Computes a registered cost from a candidate's price and plan before training; None
            for the costs in `Price` and for measured ones.
    """

    function: CostFunction | None = None

    @property
    def is_cost(self) -> bool:
        """True, also for a cost that is only measured."""
        return True

    def of(self, price: Price, plan: AdapterPlan) -> float:
        """Return the cost of a candidate.

        Raises:
            SettingsError: if a registered function fails, or returns no number of at least 0.
        """
        if self.function is None:
            return price.value(self.name)
        with blamed("cost", self.name, "its function fails", "correct the function"):
            value = self.function(price, plan)
            if isinstance(value, str | bytes):  # float() would read it.
                raise TypeError(f"it returns {value!r}, not a number")
            value = float(value)
        if not (math.isfinite(value) and value >= 0.0):
            problem = f"must be a number of at least 0, but is {value} for {price}"
            raise SettingsError("cost", self.name, problem, "correct the function")
        return value


def _as_cost(name: str, part: Any) -> Cost:
    if isinstance(part, Cost):
        return part
    if callable(part) and not isinstance(part, type):
        unit = str(getattr(part, "unit", ""))
        own = getattr(part, "__name__", "cost")
        name = name or ("cost" if own.startswith("<") else own)
        return Cost(name, "minimize", unit, is_known=True, function=part)
    raise TypeError("must be a function of a candidate's price and plan")


COSTS: Registry[Cost] = Registry("cost", "autopeft.costs", __name__, _as_cost)
"""Every cost."""


@overload
def register_cost(
    name: str | None = None, function: None = None, *, unit: str = ""
) -> Callable[[F], F]: ...
@overload
def register_cost(name: str, function: F, *, unit: str = "") -> F: ...
@overload
def register_cost(name: F, *, unit: str = "") -> F: ...
def register_cost(name: Any = None, function: Any = None, *, unit: str = "") -> Any:
    """Register a cost that is known before training, to be an objective or to have a limit.

    A call, or a decorator of the function. A package offers one with an entry point of the group
    `autopeft.costs`.

    Args:
        name: Its name in settings; as a bare decorator, that of the function.
        function: Returns the cost, a number of at least 0, of a candidate's `Price` and
            `AdapterPlan`. Or where it is found, as `module:function`.
        unit: For people.

    Returns:
        The function, or a decorator.

    Raises:
        SettingsError: if the name stands for another cost.

    Example:
        >>> @autopeft.register_cost
        ... def deploy_cost(price, plan):
        ...     return 0.02 * price.adapter_bytes / 1e6 + 0.001 * len(plan.specs)
        >>> topology = autopeft.Topology(2, {"attn.q": (64, 64), "attn.v": (64, 64)})
        >>> space = autopeft.SearchSpace.from_source({"methods": ["lora"]}, topology)
        >>> controller = autopeft.SearchController(
        ...     space, ["accuracy", "deploy_cost"], constraints=["deploy_cost<=0.01"]
        ... )
        >>> controller.ask().costs.others["deploy_cost"] <= 0.01
        True
    """
    own = name if isinstance(name, str) else ""

    def wrap(part: Any) -> Any:
        if isinstance(part, Cost) or not callable(part):
            return part
        made = _as_cost(own, part)
        return replace(made, unit=unit or made.unit)

    return COSTS.door(name, function, wrap)


for _cost in (
    Cost("trainable_params", "minimize", "parameters", is_known=True),
    Cost("adapter_bytes", "minimize", "bytes", is_known=True),
    Cost("train_flops", "minimize", "FLOPs", is_known=True),
    Cost("peak_memory_bytes", "minimize", "bytes", is_known=True),
    Cost("train_seconds", "minimize", "seconds"),
    Cost("latency_ms", "minimize", "ms"),
):
    register_cost(_cost.name, _cost)


QUALITIES: Mapping[str, Objective] = {"forgetting": Objective("forgetting", "minimize", "nats")}
"""Qualities that may stand beside the leading one, by name. See the setting `retain`."""


_MINIMIZED = frozenset("loss perplexity error mse rmse mae wer cer".split())


def default_direction(name: str) -> Direction:
    """Return the direction of a quality that says nothing of it, from the words of its name.

    "minimize" if one of them is loss, perplexity, error, mse, rmse, mae, wer or cer and the first
    is not "neg"; else "maximize".
    """
    words = name.lower().replace("-", "_").split("_")
    return "minimize" if words[0] != "neg" and _MINIMIZED & set(words) else "maximize"


def objective(name: str) -> Objective:
    """The objective of that name: one of `QUALITIES`, a cost from `COSTS`, else a quality metric.

    Raises:
        SettingsError: if the name is empty.
    """
    if not name:
        raise SettingsError("objectives", name, "an objective needs a name", "use e.g. accuracy")
    if name in COSTS or ":" in name:
        return find_cost("objectives", name)
    if name in QUALITIES:
        return QUALITIES[name]
    return Objective(name, default_direction(name))


class Pricer(Protocol):
    """Prices candidates, as `PriceTable` does."""

    def price(self, candidate: Candidate) -> Price:
        """Return what a candidate costs."""


@dataclass(frozen=True)
class WithCosts:
    """Adds registered costs to the prices of another pricer."""

    prices: Pricer
    costs: tuple[Cost, ...]

    def price(self, candidate: Candidate) -> Price:
        """Return what a candidate costs."""
        price = self.prices.price(candidate)
        others = {cost.name: cost.of(price, candidate.plan) for cost in self.costs}
        return replace(price, others={**price.others, **others})


def find_cost(field: str, value: Any) -> Cost:
    """Return the cost that a setting names; one given as `module:function` or object is registered.

    Raises:
        SettingsError: if there is no such cost.
    """
    cost = COSTS.resolve(field, value)
    if cost.name not in COSTS:
        COSTS.register(cost.name, cost)
    return cost


def find_beside(value: Any) -> Objective:
    """Return what the setting `objectives` names: one of `QUALITIES`, or a cost.

    Raises:
        SettingsError: if there is no such cost.
    """
    found = QUALITIES.get(value) if isinstance(value, str) else None
    return found or find_cost("objectives", value)


def with_costs(prices: Pricer, names: Iterable[str]) -> Pricer:
    """Return a pricer that also computes the registered costs among these names."""
    known = (COSTS[name] for name in dict.fromkeys(names) if name in COSTS)
    costs = tuple(cost for cost in known if cost.function is not None)
    return WithCosts(prices, costs) if costs else prices
