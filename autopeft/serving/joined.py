"""Modules that a server computes as one: which of them an adapter must hold together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Joined:
    """Modules beside each other whose factors a server puts into one buffer.

    Attributes:
        names: The modules' names.
        needed: Those that must have factors as soon as one of `names` has them.

    Example:
        >>> Joined(("gate_proj", "up_proj"), needed=("gate_proj",)).absent({"mlp.up_proj"})
        ('mlp.gate_proj',)
    """

    names: tuple[str, ...]
    needed: tuple[str, ...]

    def absent(self, paths: Iterable[str]) -> tuple[str, ...]:
        """Return the modules that must have factors too, beside those at `paths`."""
        held = dict.fromkeys(paths)
        split = (path.rpartition(".") for path in held)
        parents = dict.fromkeys(parent for parent, _, name in split if name in self.names)
        wanted = (f"{parent}.{name}" for parent in parents for name in self.needed)
        return tuple(path for path in wanted if path not in held)


def absent(paths: Iterable[str], joined: Sequence[Joined]) -> tuple[str, ...]:
    """Return the modules that must have factors too, of all groups."""
    held = tuple(paths)
    return tuple(path for group in joined for path in group.absent(held))
