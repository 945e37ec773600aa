"""The table of methods by name: built-in ones, those of installed packages, and a user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral
from types import MappingProxyType
from typing import Any, TypeVar, cast, overload

from autopeft.errors import SpaceError
from autopeft.methods.base import AdapterFlops, AdapterMemory, Method
from autopeft.utils.formatting import one_line
from autopeft.utils.registry import Registry

F = TypeVar("F")

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


def _as_method(name: str, part: Any) -> Method:
    if isinstance(part, type) and issubclass(part, Method):
        try:
            part = cast(Any, part)()
        except TypeError as error:
            raise TypeError(f"must be made without arguments, but {error}") from None
    if not isinstance(part, Method):
        raise TypeError("must be an autopeft.methods.Method")
    if name and part.name != name:
        raise TypeError(f"is the method {part.name!r}, which plans would name")
    _check_attributes(part)
    _check_formulas(part)
    return part


def _check_attributes(part: Method) -> None:
    """Refuse attributes of another type, which the search would trip over much later."""
    rates: Any = part.learning_rate
    is_pair = isinstance(rates, tuple) and len(rates) == 2
    if not (is_pair and all(isinstance(r, int | float) for r in rates) and 0 < rates[0] < rates[1]):
        raise TypeError(f"has learning_rate={rates!r}, but it must be (low, high), 0 < low < high")
    for attribute, kind in (("roles", str), ("input_side_roles", str), ("default_ranks", int)):
        values: Any = getattr(part, attribute)
        if not isinstance(values, tuple) or not all(isinstance(v, kind) for v in values):
            raise TypeError(
                f"has {attribute}={values!r}, but it must be a tuple of {kind.__name__}"
            )


def _check_formulas(part: Method) -> None:
    """Try the formulas at one site: a price that fails later would be blamed on the search."""
    shape = (64, 64)
    ranks = [rank for rank in part.default_ranks or (0,) if part.is_legal_rank(rank, shape)]
    if not part.roles or not ranks:
        return
    kinds = {"n_params": Integral, "flops": AdapterFlops, "memory": AdapterMemory}
    for formula, kind in kinds.items():
        try:
            value = getattr(part, formula)(ranks[0], shape, part.roles[0])
        except Exception as error:
            raise TypeError(f"has a {formula} that fails ({one_line(error)})") from error
        if not isinstance(value, kind) or (isinstance(value, Integral) and int(value) < 0):
            rule = "a count of at least 0" if kind is Integral else f"an {kind.__name__}"
            raise TypeError(f"has a {formula} that returns {value!r}, but it must be {rule}")


METHODS: Registry[Method] = Registry(
    "method", "autopeft.methods", "autopeft.methods", _as_method, SpaceError
)
"""Every method."""


@overload
def register_method(name: str, method: None = None) -> Callable[[F], F]: ...
@overload
def register_method(name: str, method: F) -> F: ...
@overload
def register_method(name: F) -> F: ...
def register_method(name: Any, method: Any = None) -> Any:
    """Register an adapter method, so that spaces and plans can name it.

    A call, or a decorator of a class that can be made without arguments. A package offers
    one with an entry point of the group `autopeft.methods`.

    Args:
        name: The method, or its name.
        method: The method, its class, or where it is found, as `module:name`.

    Returns:
        The method or class, or a decorator.

    Raises:
        SpaceError: if the name stands for another method.

    Example:
        >>> from dataclasses import replace
        >>> import autopeft.methods
        >>> lora = autopeft.methods.get("lora")
        >>> half = replace(lora, name="lora_attn", roles=("attn.q", "attn.v"))
        >>> autopeft.register_method(half).takes_rank
        True
        >>> autopeft.methods.get("lora_attn").roles
        ('attn.q', 'attn.v')
    """
    return METHODS.door(name, method)


def all_methods() -> tuple[Method, ...]:
    """Return every method, ordered by family; registered ones come last."""
    return METHODS.parts()


def get(name: str) -> Method:
    """Return the method of that name.

    Raises:
        SpaceError: if there is none.
    """
    if name in LEFT_OUT and name not in METHODS:
        raise SpaceError("method", name, f"not offered: {LEFT_OUT[name]}", "use another method")
    return METHODS.resolve("method", name)
