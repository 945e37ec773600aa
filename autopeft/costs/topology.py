"""The shapes of a model: where adapters can go, as plain data."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from autopeft.errors import SpaceError
from autopeft.methods.base import Shape as Shape
from autopeft.plan import MODEL


@dataclass(frozen=True)
class Topology:
    """Where adapters can go in one model: plain shapes, read from a model or written by hand.

    Attributes:
        n_layers: Number of blocks; in an encoder-decoder the encoder's come first.
        shapes: Role -> (out, in) of the linear module with that role. "experts.": (out, in,
            experts). "norm": (width, number of
            vectors in the block's normalizations), so that the product counts their parameters.
            "block": (width, width). "attn": (heads, total width of the heads), if self-attentions
            can have a prefix. "model": (most virtual tokens, width of the input embeddings), if the
            model can have a prompt; it counts as a site of layer 0.
        overrides: (layer, role) -> shape, where a block differs from `shapes`; None where the block
            lacks the role.
        n_heads: Attention heads; 0 where unknown.
        head_params: Parameters trained besides the adapters (a new classification head).
        n_encoder_layers: Number of the encoder's blocks in an encoder-decoder; else 0.
        transposed_roles: Roles whose modules store their weight as (in, out), as GPT-2's Conv1D
            does.
        is_quantized: Whether weights are stored in 4 or 8 bits, which not all methods support.

    Raises:
        SpaceError: if a count or a shape is not made of whole numbers.

    Example:
        >>> topology = autopeft.Topology(2, {"attn.q": (64, 64), "mlp.down": (64, 256)})
        >>> topology.shape(1, "mlp.down")
        (64, 256)
    """

    n_layers: int
    shapes: Mapping[str, Shape]
    overrides: Mapping[tuple[int, str], Shape | None] = field(default_factory=dict)
    n_heads: int = 0
    head_params: int = 0
    n_encoder_layers: int = 0
    transposed_roles: tuple[str, ...] = ()
    is_quantized: bool = False

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_heads", "head_params", "n_encoder_layers"):
            if not _is_count(value := getattr(self, name)):
                raise SpaceError(name, value, "must be a whole number from 0", "use e.g. 2")
        for name, example in _MAPPINGS.items():
            if not isinstance(value := getattr(self, name), Mapping):
                raise SpaceError(name, value, "must be a mapping", f"use e.g. {example}")
        shapes = {role: _checked("shapes", role, role, each) for role, each in self.shapes.items()}
        object.__setattr__(self, "shapes", shapes)
        overrides: dict[tuple[int, str], Shape | None] = {}
        for site, each in self.overrides.items():
            if not (isinstance(site, tuple) and len(site) == 2 and _is_count(site[0])):
                problem, example = "a key must be (layer, role)", _MAPPINGS["overrides"]
                raise SpaceError("overrides", site, problem, f"use e.g. {example}")
            overrides[site] = None if each is None else _checked("overrides", site, site[1], each)
        object.__setattr__(self, "overrides", overrides)

    def without(self, roles: Collection[str]) -> Topology:
        """Return the same model with no sites of these roles.

        Example:
            >>> topology = autopeft.Topology(2, {"attn.q": (64, 64), "mlp.down": (64, 256)})
            >>> topology.without({"mlp.down"}).roles(0)
            ('attn.q',)
        """
        kept = {role: shape for role, shape in self.shapes.items() if role not in roles}
        others = {site: shape for site, shape in self.overrides.items() if site[1] not in roles}
        return replace(self, shapes=kept, overrides=others)

    def shape(self, layer: int, role: str) -> Shape | None:
        """Return (out, in) at a site, or None if the model has no such site."""
        if not 0 <= layer < self.n_layers or (role == MODEL and layer):
            return None
        if (layer, role) in self.overrides:
            return self.overrides[layer, role]
        return self.shapes.get(role)

    def roles(self, layer: int) -> tuple[str, ...]:
        """Return the roles of one block, in no particular order."""
        extra = [role for at, role in self.overrides if at == layer and role not in self.shapes]
        return tuple(r for r in (*self.shapes, *extra) if self.shape(layer, r) is not None)


_MAPPINGS = {"shapes": '{"attn.q": (64, 64)}', "overrides": '{(0, "attn.q"): (32, 64)}'}
"""Field that is a mapping -> an example of it."""


def _is_count(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and operator.index(value) >= 0
    except TypeError:
        return False


def _checked(name: str, key: Any, role: Any, shape: Any) -> Shape:
    """Return a shape as a tuple, or raise a SpaceError that names it."""
    wanted = ("out", "in", "experts") if str(role).startswith("experts.") else ("out", "in")
    is_shape = isinstance(shape, list | tuple) and all(_is_count(size) for size in shape)
    if not isinstance(role, str) or not is_shape or len(shape) != len(wanted):
        problem = f"must be ({', '.join(wanted)}) in whole numbers"
        raise SpaceError(
            f"{name}[{key!r}]", shape, problem, f"use e.g. {(64, 64, 4)[: len(wanted)]}"
        )
    return tuple(shape)
