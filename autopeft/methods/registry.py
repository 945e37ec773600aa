"""The table of methods by name: built-in ones, those of installed packages, and a user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar, cast, overload

from autopeft.errors import SpaceError
from autopeft.methods.base import Method
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
    return part


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
