"""The objectives of a search: a quality, and the costs and further qualities beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, overload

from autopeft.errors import SettingsError
from autopeft.utils.registry import Registry, blamed, import_object

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

Measure = Callable[[Any], float]
"""Measures a cost of an `autopeft.training.measuring.Trained` on its worker."""

OpenMeter = Callable[[str, int], Callable[[], float]]
"""Takes the kind of a worker's devices and their number; returns what reads a counter that rises.
Raises a UserError that says why, where there is nothing to read."""

CheckCost = Callable[[Any, Any, str], None]
"""Takes the settings, the task and the kind of device; raises a SettingsError where a search with
them cannot measure the cost."""


@dataclass(frozen=True)
class Cost(Objective):
    """A cost. What is called so is minimized, but a measured one may be a speed to maximize.

    A known cost has a `function`; one that only a worker can tell has `measure` or `meter`. These
    two and `check` may be given as `module:name`, which is imported where it is used.

    Attributes:
        function: Computes a registered cost from a candidate's price and plan before training; None
            for the costs in `Price` and for measured ones.
        measure: Measures it once, after a training.
        meter: Opens a counter, such as of energy; the cost is by how much it rises in the steps of
            a training. It is also reported where it is no objective, if a worker can open it.
        proxy: The known cost that it is roughly proportional to: it predicts a measured cost, and
            stands for it where trials are pruned. "inference_flops" and "adapter_bytes" are also
            for costs of each adapted site.
        check: Says before the search starts that it cannot be measured.
        heading: For the column of a table; default: the name.
        description: What it is, and how it is measured; names of settings in braces stand for
            their values.

    Example:
        >>> def n_hooks(trained):  # Adapters that hook into the model are slow to serve.
        ...     return float(sum(len(m._forward_hooks) for m in trained.model.modules()))
        >>> cost = autopeft.Cost("n_hooks", measure=n_hooks, proxy="adapter_bytes")
        >>> autopeft.register_cost(cost) is cost
        True
        >>> settings = autopeft.SearchSettings(model="gpt2", data="a.csv", objectives=["n_hooks"])
    """

    direction: Direction = "minimize"
    function: CostFunction | None = None
    measure: Measure | str | None = None
    meter: OpenMeter | str | None = None
    proxy: str = "train_flops"
    check: CheckCost | str | None = None
    heading: str = ""
    description: str = ""

    @property
    def is_cost(self) -> bool:
        """True, also for a cost that is only measured."""
        return True

    @property
    def is_measured(self) -> bool:
        """Whether only a worker can tell it."""
        return not self.is_known and self.function is None

    @property
    def is_of_sites(self) -> bool:
        """Whether each adapted site adds to it, however small: its calls take time."""
        return not self.is_known and self.proxy in ("inference_flops", "adapter_bytes")

    def amount(self, value: Any) -> Any:
        """Return what is minimized: the value, or of a speed to maximize its inverse."""
        return value if self.direction == "minimize" else 1.0 / value

    def checked(self, value: Any, where: str) -> float:
        """Return a value of the cost as a number.

        Raises:
            SettingsError: if it is no number of at least 0.
        """
        if isinstance(value, str | bytes):  # float() would read it.
            raise TypeError(f"it returns {value!r}, not a number")
        number = float(value)
        if not (math.isfinite(number) and number >= 0.0):
            problem = f"must be a number of at least 0, but is {number} for {where}"
            raise SettingsError("cost", self.name, problem, "correct the function")
        return number

    def part(self, name: str) -> Any:
        """Return `measure`, `meter` or `check`; one given as `module:name` is imported."""
        found = getattr(self, name)
        return import_object(name, found) if isinstance(found, str) else found

    def of(self, price: Price, plan: AdapterPlan) -> float:
        """Return the cost of a candidate.

        Raises:
            SettingsError: if a registered function fails, or returns no number of at least 0.
        """
        if self.function is None:
            return price.value(self.name)
        with blamed("cost", self.name, "its function fails", "correct the function"):
            return self.checked(self.function(price, plan), f"{price}")


def _as_cost(name: str, part: Any) -> Cost:
    if isinstance(part, Cost):
        n_ways = sum(way is not None for way in (part.function, part.measure, part.meter))
        if n_ways > 1 or (part.is_known and (part.measure or part.meter)):
            raise TypeError("must be known before training, measured or metered, one of them")
        if part.direction == "maximize" and (part.is_known or part.function is not None):
            raise TypeError("must be minimized: only a measured cost may be a speed to maximize")
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
    `autopeft.costs`. A cost that is only measured is registered as a `Cost`.

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


_SERVING = "autopeft.training.serving_cost"

for _cost in (
    Cost(
        "trainable_params",
        unit="parameters",
        is_known=True,
        heading="params",
        description="trainable parameters",
    ),
    Cost("adapter_bytes", unit="bytes", is_known=True, heading="size", description="adapter size"),
    Cost("train_flops", unit="FLOPs", is_known=True, heading="FLOPs", description="training FLOPs"),
    Cost(
        "peak_memory_bytes",
        unit="bytes",
        is_known=True,
        heading="memory",
        description="peak training memory",
    ),
    Cost(
        "train_seconds",
        unit="seconds",
        measure="autopeft.training.measuring:train_seconds",
        heading="time",
        description="training time",
    ),
    Cost(
        "latency_ms",
        unit="ms",
        measure="autopeft.training.latency:latency_ms",
        proxy="inference_flops",
        heading="latency",
        description="latency",
    ),
    Cost(
        "serving_latency_ms",
        unit="ms",
        measure=f"{_SERVING}:serving_latency_ms",
        proxy="inference_flops",
        check=f"{_SERVING}:check_text",
        heading="served",
        description="latency as served: merged where that is exact, {serving_dtype}, batch "
        "{serving_batch_size}, {serving_prompt_tokens} prompt tokens",
    ),
    Cost(
        "tokens_per_second",
        unit="tokens/s",
        direction="maximize",
        measure=f"{_SERVING}:tokens_per_second",
        proxy="inference_flops",
        check=f"{_SERVING}:check_generates",
        heading="speed",
        description="speed of generation as served: merged where that is exact, {serving_dtype}, "
        "batch {serving_batch_size}, {serving_new_tokens} tokens after {serving_prompt_tokens}",
    ),
    Cost(
        "adapter_load_ms",
        unit="ms",
        measure=f"{_SERVING}:adapter_load_ms",
        proxy="adapter_bytes",
        heading="load",
        description="time from the adapter's files to the model that has it",
    ),
    Cost(
        "energy_joules",
        unit="J",
        meter="autopeft.training.energy:open_energy",
        check="autopeft.training.energy:check_energy",
        heading="energy",
        description="energy of training: of the accelerators, or the process's share of the CPUs'",
    ),
):
    register_cost(_cost.name, _cost)


def check_costs(objectives: Sequence[Objective], settings: Any, task: Any, device: str) -> None:
    """Check that a search with these settings can measure what it optimizes.

    Args:
        objectives: The quality first.
        settings: The search's settings.
        task: Its task.
        device: Kind of the workers' devices, as torch names it.

    Raises:
        SettingsError: if it cannot.
    """
    for cost in (o for o in objectives if isinstance(o, Cost) and o.check is not None):
        cost.part("check")(settings, task, device)


QUALITIES: Mapping[str, Objective] = {"forgetting": Objective("forgetting", "minimize", "nats")}
"""Qualities that may stand beside the leading one, by name. See the setting `retain`."""

_OF_SECOND_TASK = re.compile(r"(?P<task>[A-Za-z_][\w-]*)\.(?P<metric>[A-Za-z_][\w-]*)")
"""Name of the metric of a second task, such as squad.f1. See the setting `also`."""


PERPLEXITY = "perplexity"
"""The metric that is compared by its logarithm, the loss."""

_MINIMIZED = frozenset("loss perplexity error mse rmse mae wer cer".split())


def default_direction(name: str) -> Direction:
    """Return the direction of a quality that says nothing of it, from the words of its name.

    "minimize" if one of them is loss, perplexity, error, mse, rmse, mae, wer or cer and the first
    is not "neg"; else "maximize".
    """
    words = name.lower().replace("-", "_").split("_")
    return "minimize" if words[0] != "neg" and _MINIMIZED & set(words) else "maximize"


def quality_beside(name: str) -> Objective | None:
    """Return the quality of that name that may stand beside the leading one; None: it is none.

    It is one of `QUALITIES`, or the metric of a second task, whose direction the words of its name
    tell here; the task itself may know better.

    Example:
        >>> from autopeft.costs.objectives import quality_beside
        >>> quality_beside("squad.f1").direction, quality_beside("notes.loss").direction
        ('maximize', 'minimize')
        >>> quality_beside("trainable_params") is None
        True
    """
    if name in QUALITIES:
        return QUALITIES[name]
    match = _OF_SECOND_TASK.fullmatch(name)
    if match is None or name in COSTS:
        return None
    return Objective(name, default_direction(match["metric"]))


def objective(name: str) -> Objective:
    """The objective of that name: a further quality, a cost from `COSTS`, else a quality metric.

    Raises:
        SettingsError: if the name is empty.
    """
    if not name:
        raise SettingsError("objectives", name, "an objective needs a name", "use e.g. accuracy")
    if name in COSTS or ":" in name:
        return find_cost("objectives", name)
    return quality_beside(name) or Objective(name, default_direction(name))


def check_leading(field: str, quality: Objective) -> None:
    """Check that what leads a search is a quality: its scores would stand for a cost's values.

    Raises:
        SettingsError: if it is a cost, or has the name of one.
    """
    from autopeft.costs.price import Price

    known = {each.name for each in fields(Price)}
    if quality.is_cost or quality.name in known or quality.name in COSTS:
        problem = "is a cost, and trials are told the score of a quality"
        remedy = f"name a quality first, e.g. accuracy,{quality.name}"
        if field == "metric":
            remedy = "name what is measured otherwise, e.g. accuracy"
        raise SettingsError(field, quality.name, problem, remedy)


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


def by_rank(objectives: Iterable[Objective]) -> list[Objective]:
    """Return what stands beside the quality in the order of a search.

    First costs to minimize, the first of which finalists are compared at, then speeds to maximize,
    then further qualities.

    Raises:
        SettingsError: if there is no cost to minimize.
    """
    ranked = sorted(objectives, key=lambda o: (not o.is_cost, o.direction == "maximize"))
    if ranked and ranked[0].direction == "maximize":
        problem = "is maximized, and adapters are compared at a cost that is minimized"
        remedy = f"add one, e.g. trainable_params,{ranked[0].name}"
        raise SettingsError("objectives", ranked[0].name, problem, remedy)
    return ranked


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
    """Return what the setting `objectives` names: a further quality, or a cost.

    Raises:
        SettingsError: if there is no such cost.
    """
    found = quality_beside(value) if isinstance(value, str) else None
    return found or find_cost("objectives", value)


def reported_beside(measured: Mapping[str, float], limited: Iterable[str] = ()) -> dict[str, float]:
    """Return those of measured values that reports show where they are no objectives.

    Further qualities, costs that a worker's meter tells, and those that have a limit.

    Args:
        measured: Measured values by name.
        limited: Names of measured costs that have a limit.
    """
    registered = {name: COSTS[name] for name in COSTS.registered if name in measured}
    shown = {name for name, cost in registered.items() if cost.meter is not None} | {*limited}
    return {n: v for n, v in measured.items() if n in shown or quality_beside(n) is not None}


def proxy_of(name: str) -> str:
    """Return the known cost that stands for one that is only measured; others stand as they are."""
    cost = COSTS[name] if name in COSTS.registered else None
    return cost.proxy if cost is not None and cost.is_measured else name


def with_costs(prices: Pricer, names: Iterable[str]) -> Pricer:
    """Return a pricer that also computes the registered costs among these names."""
    known = (COSTS[name] for name in dict.fromkeys(names) if name in COSTS)
    costs = tuple(cost for cost in known if cost.function is not None)
    return WithCosts(prices, costs) if costs else prices
