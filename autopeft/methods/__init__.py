"""The adapter methods, torch-free, one file for each family: capabilities, ranges, costs.

A new family is a file with a tuple `METHODS`, listed in `_FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from autopeft.errors import SpaceError
from autopeft.methods.base import LINEAR_ROLES, AdapterFlops, AdapterMemory, Method
from autopeft.utils.serialize import nearest

__all__ = [
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

_TABLE: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for family in _FAMILIES
        for method in import_module(f"{__name__}.{family}").METHODS
    }
)


LEFT_OUT: Mapping[str, str] = MappingProxyType(
    {
        "lily": "it mixes its experts by their mean over a batch, so a row's prediction "
        "depends on the other rows and their padding",
        "adamss": "its subspaces come from a random clustering that its files do not hold",
        "frod": "its bases come from a decomposition that its files do not hold and that differs "
        "between machines",
        "poly": "it selects skills by a task number that rows do not have",
        "xlora": "it mixes adapters that must have been trained before",
    }
)
"""Methods of peft that are not offered -> why, for error messages."""


def all_methods() -> tuple[Method, ...]:
    """Return every method, ordered by family."""
    return tuple(_TABLE.values())


def get(name: str) -> Method:
    """Return the method of that name.

    Raises:
        SpaceError: if there is none.
    """
    if name in _TABLE:
        return _TABLE[name]
    if name in LEFT_OUT:
        raise SpaceError("method", name, f"not offered: {LEFT_OUT[name]}", "use another method")
    raise SpaceError("method", name, "no such method", nearest(name, _TABLE))


def learning_rate_range(name: str) -> tuple[float, float]:
    """Return (low, high) of a method's learning rate, or of the head's for "head".

    Raises:
        SpaceError: if there is no such method.
    """
    return HEAD_RATES if name == HEAD else get(name).learning_rate
