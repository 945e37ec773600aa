"""Checks a cost: a number of at least 0 that only the candidate decides."""

from __future__ import annotations

from typing import Any

import numpy as np

from autopeft.costs.objectives import COSTS, with_costs
from autopeft.plan import AdapterPlan
from autopeft.testing.plain_space import plain_prices, plain_space
from autopeft.testing.requirement import Requirement, registered

_N_CANDIDATES = 40


def check_cost(cost: Any) -> None:
    """Check that a cost can be an objective or have a limit.

    For candidates of the default space, and for the empty plan, it is a finite number of at least
    0, the same each time, also in another process. Of a measured one, only that it can be sent to a
    worker.

    Args:
        cost: The function of price and plan, the `Cost`, or its name.

    Raises:
        AssertionError: if it does not; the message is one line.
        SettingsError: if it is no cost.

    Example:
        >>> from autopeft.testing import check_cost
        >>> check_cost(lambda price, plan: price.adapter_bytes / 1e6 + len(plan.specs))
        >>> check_cost(lambda price, plan: 1 / len(plan.specs))
        Traceback (most recent call last):
        ...
        AssertionError: cost cost: pricing the empty plan fails: ...
    """
    part = COSTS.resolve("cost", cost)
    require = Requirement(f"cost {part.name}")
    is_measured = part.measure is not None or part.meter is not None
    require.that(is_measured or part.direction == "minimize", "known costs are minimized")
    if part.function is None:
        if is_measured:
            require.pickled(part)
        return  # In `Price`, or only a worker can tell it.
    elsewhere = require.pickled(part)
    space, table = plain_space(), plain_prices()
    rng = np.random.default_rng(0)
    candidates = [space.reference(), *space.baselines()]
    candidates += [space.sample(rng) for _ in range(_N_CANDIDATES)]
    with registered(COSTS, part.name, part):
        prices = with_costs(table, [part.name])
        for candidate in candidates:
            is_empty = candidate.plan == AdapterPlan()
            shown = "the empty plan" if is_empty else f"the plan {candidate.digest}"
            with require.no_error(f"pricing {shown}"):
                value = prices.price(candidate).value(part.name)
                others = [part.of(table.price(candidate), candidate.plan) for _ in range(2)]
                others.append(elsewhere.of(table.price(candidate), candidate.plan))
            for other in others:
                text = f"{shown} costs {value} and then {other}; only price and plan may decide it"
                require.that(other == value, text)
