"""What a trial of any study costs: read from its user attribute, or computed by a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from autopeft.errors import UserError
from autopeft.utils.formatting import one_line

PRICE_KEY = "price"
"""User attribute of a trial with its price: cost name -> number, or one number."""

CostFunction = Callable[[dict[str, Any]], float | Mapping[str, float]]
"""Returns the cost, or costs by name, of a trial with these parameters."""

_REMEDY = (
    'set it before the first report, trial.set_user_attr("price", {"seconds": 12.0}), '
    "or give GapPruner(costs=function of the trial's params)"
)


class TrialCosts:
    """Reads the costs of trials, always the same ones in the same order.

    Args:
        names: Names of the costs; None for those of the first price that is read.
        function: Computes the price from a trial's parameters; None: it is a user attribute.
    """

    def __init__(
        self, names: Sequence[str] | None = None, function: CostFunction | None = None
    ) -> None:
        self.names = None if names is None else tuple(names)
        self._function = function

    def of(self, trial: FrozenTrial) -> list[float]:
        """Return a trial's costs.

        Raises:
            UserError: if it has none, or they are no numbers.
        """
        if self.names == ():
            return []
        price = self._price(trial)
        if self.names is None:
            self.names = tuple(sorted(price)) if isinstance(price, Mapping) else ("cost",)
        if not isinstance(price, Mapping):
            price = {"cost": price} if len(self.names) > 1 else {self.names[0]: price}
        costs = []
        for name in self.names:
            value = price[name] if name in price else price.get(_proxy(name))
            if value is None:
                problem = f"trial {trial.number} has no cost {name!r}"
                raise UserError(PRICE_KEY, dict(price), problem, _REMEDY)
            costs.append(_number(name, value, trial))
        return costs

    def _price(self, trial: FrozenTrial) -> Any:
        if self._function is None:
            price = trial.user_attrs.get(PRICE_KEY)
            if price is None or price == {}:
                raise UserError(PRICE_KEY, price, f"trial {trial.number} has no costs", _REMEDY)
        else:
            try:
                price = self._function(dict(trial.params))
            except Exception as error:
                problem = f"the function fails for trial {trial.number} ({one_line(error)})"
                raise UserError("costs", trial.params, problem, "correct the function") from error
            if price is None or price == {}:
                problem = f"the function returns none of trial {trial.number}"
                raise UserError("costs", price, problem, "return a number, or costs by name")
        # A price of autopeft's keeps registered costs in a mapping of their own.
        return {**price, **price.get("others", {})} if isinstance(price, Mapping) else price


def _proxy(name: str) -> str:
    """Return the known cost that stands for one that autopeft only measures."""
    # Imported late: Optuna's own users need nothing else of autopeft.
    from autopeft.costs.objectives import COST_PROXIES

    return COST_PROXIES.get(name, name)


def _number(name: str, value: Any, trial: FrozenTrial) -> float:
    try:
        number = float("nan") if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number):
        problem = f"the cost {name!r} of trial {trial.number} must be a finite number"
        raise UserError(PRICE_KEY, value, problem, "set a number")
    return number
