"""What a trial of any tool costs: prices become numbers in one order. Free of Optuna and Ray."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autopeft.errors import UserError
from autopeft.utils.formatting import one_line
from autopeft.utils.serialize import to_float

CostFunction = Callable[[dict[str, Any]], float | Mapping[str, float]]
"""Returns the cost, or costs by name, of a trial with these parameters."""


class TrialCosts:
    """Reads the prices of trials: always the same costs in the same order.

    Args:
        names: Names of the costs; None for those of the first price that is read.
        field: What errors call the price.
        remedy: What errors advise where a price lacks a cost.
    """

    def __init__(self, names: Sequence[str] | None, field: str, remedy: str) -> None:
        self.names = None if names is None else tuple(names)
        self._field = field
        self._remedy = remedy

    def of(self, trial: object, price: Any) -> list[float]:
        """Return the costs of a trial, given how errors name it and its price.

        Raises:
            UserError: if the price lacks a cost, or a cost is no number.
        """
        if self.names == ():
            return []
        if price is None or price == {}:
            raise UserError(self._field, price, f"trial {trial} has no costs", self._remedy)
        if isinstance(price, Mapping):
            # A price of autopeft's keeps registered costs in a mapping of their own.
            price = {**price, **price.get("others", {})}
        if self.names is None:
            self.names = tuple(sorted(price)) if isinstance(price, Mapping) else ("cost",)
        if not isinstance(price, Mapping):
            price = {self.names[0]: price} if len(self.names) == 1 else {"cost": price}
        return [self._number(name, price, trial) for name in self.names]

    def _number(self, name: str, price: Mapping[str, Any], trial: object) -> float:
        value = price[name] if name in price else price.get(stand_in(name))
        if value is None:
            problem = f"trial {trial} has no cost {name!r}"
            raise UserError(self._field, dict(price), problem, self._remedy)
        number = to_float(value)
        if number is None or not math.isfinite(number):
            problem = f"the cost {name!r} of trial {trial} must be a finite number"
            raise UserError(self._field, value, problem, "correct it")
        return number


def computed_price(function: CostFunction, trial: object, params: Mapping[str, Any]) -> Any:
    """Return what a user's function says that a trial costs.

    Raises:
        UserError: if the function fails.
    """
    try:
        return function(dict(params))
    except Exception as error:
        problem = f"the function fails for trial {trial} ({one_line(error)})"
        raise UserError("costs", dict(params), problem, "correct the function") from error


def stand_in(name: str) -> str:
    """Return the known cost that stands for one that autopeft only measures."""
    # Imported late: users of other tools need nothing else of autopeft.
    from autopeft.costs.objectives import proxy_of

    return proxy_of(name)


def counts_sites(names: Sequence[str]) -> bool:
    """Return whether each adapted site adds to one of the costs, however small."""
    from autopeft.costs.objectives import COSTS

    return any(COSTS[name].is_of_sites for name in names if name in COSTS.registered)
