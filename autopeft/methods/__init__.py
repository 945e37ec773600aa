"""The adapter methods, torch-free, one file for each family: capabilities, ranges, costs.

A new family is a file with a tuple `METHODS`, listed in `_FAMILIES`.
"""

from __future__ import annotations

from importlib import import_module

from autopeft.methods.base import EXPERT_ROLES, LINEAR_ROLES, AdapterFlops, AdapterMemory, Method
from autopeft.methods.registry import LEFT_OUT, all_methods, get, register_method

__all__ = [
    "EXPERT_ROLES",
    "HEAD",
    "HEAD_RATES",
    "LEFT_OUT",
    "LINEAR_ROLES",
    "AdapterFlops",
    "AdapterMemory",
    "Method",
    "all_methods",
    "get",
    "learning_rate_range",
    "register_method",
]

HEAD = "head"
"""The pseudo-method of parameters trained besides the adapters: a new classification head."""

HEAD_RATES = (1e-3, 3e-2)
"""(low, high) of the learning rates worth searching for a new head."""

_FAMILIES = """
lora ia3 oft ln_tuning miss loha lokr hira delora c3a fourierft waveft gralora boft hra psoft road
beft shira peanut deft osf supertuning bottleneck prefix prompt glora vera vblora unilora tinylora
randlora adalora
""".split()
"""Files of this package, in the order of the table of methods."""

for _family in _FAMILIES:
    for _method in import_module(f"{__name__}.{_family}").METHODS:
        register_method(_method)


def learning_rate_range(name: str) -> tuple[float, float]:
    """Return (low, high) of a method's learning rate, or of the head's for "head".

    Raises:
        SpaceError: if there is no such method.
    """
    return HEAD_RATES if name == HEAD else get(name).learning_rate
