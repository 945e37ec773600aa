"""Reading and checking the YAML of a search space."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from autopeft import methods
from autopeft.errors import SpaceError
from autopeft.plan import MODEL, ROLES
from autopeft.utils.serialize import from_plain, nearest
from autopeft.utils.yaml_files import read_yaml

DEFAULT_PLACEMENTS: Mapping[str, tuple[str, ...]] = {
    "qv": ("attn.q", "attn.v"),
    "attention": ("attn.q", "attn.k", "attn.v", "attn.o"),
    "mlp": ("mlp.up", "mlp.gate", "mlp.down"),
    "all": ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.gate", "mlp.down"),
}
"""Placements of a space that defines none."""

DEFAULT_ALPHA = 16.0
"""Alpha of a space that defines none. A constant alpha keeps the best learning rate nearly the same
at every rank (`examples/benchmarks/learning_rates.py --ranks`). With alpha = 2 rank it falls as the
rank grows, and where ranks are mixed the low ones learn too slowly.
"""


@dataclass(frozen=True)
class MethodOverride:
    """The ranks and the learning rates that a space sets for a method; None keeps the default."""

    ranks: tuple[int, ...] | None = None
    learning_rate: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.ranks is not None:
            object.__setattr__(self, "ranks", tuple(sorted(set(self.ranks))))


@dataclass(frozen=True)
class SpaceConfig:
    """A search space as written: checked for form, but not against a model.

    Attributes:
        methods: Method name -> overrides.
        granularity: "model", "group:K", "layer" or "site": the parts that share one choice.
        roles: Allowed roles; None for all roles of the placements.
        placements: Name -> roles that are adapted together.
        layers: "all", "last:K", "first:K" or block indices.
        alpha: Choices for alpha, the same at every rank; None if `alpha_ratio` is given.
        alpha_ratio: Choices for alpha / rank in its place; None for a fixed alpha.
        dropout: Choices.
        include_empty: Whether a plan without adapters may be sampled.
        min_adapted_layers: Minimum number of blocks with an adapter.
        max_adapted_layers: Maximum; None for all blocks.
        name: Name to display.
        is_shipped: True for a space that comes with autopeft. Parts that the model lacks are then
            left out, and are no error.
        has_own_placements: True if the user wrote the placements.
    """

    methods: Mapping[str, MethodOverride]
    granularity: str = "layer"
    roles: tuple[str, ...] | None = None
    placements: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: dict(DEFAULT_PLACEMENTS)
    )
    layers: str | tuple[int, ...] = "all"
    alpha: tuple[float, ...] | None = None
    alpha_ratio: tuple[float, ...] | None = None
    dropout: tuple[float, ...] = (0.0,)
    include_empty: bool = False
    min_adapted_layers: int = 0
    max_adapted_layers: int | None = None
    name: str = "space"
    is_shipped: bool = False
    has_own_placements: bool = False

    def __post_init__(self) -> None:
        if not self.methods:
            raise SpaceError("space.methods", self.methods, "must name a method", "use e.g. [lora]")
        for name, override in self.methods.items():
            _check_override(f"space.methods.{name}", override)
        if not re.fullmatch(r"model|layer|site|group:0*[1-9][0-9]*", self.granularity):
            raise SpaceError(
                "space.granularity",
                self.granularity,
                "unknown granularity",
                "use model, group:4, layer or site",
            )
        if self.roles is not None:
            object.__setattr__(self, "roles", _known_roles("space.roles", self.roles))
        placements = {
            name: _known_roles(f"space.placements.{name}", roles)
            for name, roles in self.placements.items()
        }
        object.__setattr__(self, "placements", placements)
        object.__setattr__(self, "layers", _known_layers(self.layers))
        if self.alpha is not None and self.alpha_ratio is not None:
            raise SpaceError(
                "space.alpha_ratio",
                list(self.alpha_ratio),
                f"alpha is given too: {list(self.alpha)}",
                "keep one: alpha (the same at every rank) or alpha_ratio (alpha / rank)",
            )
        if self.alpha is None and self.alpha_ratio is None:
            object.__setattr__(self, "alpha", (DEFAULT_ALPHA,))
        name, choices = self.alphas
        if not choices or not all(0 < choice < math.inf for choice in choices):
            example = "[16, 32]" if name == "alpha" else "[1, 2]"
            raise SpaceError(
                f"space.{name}", list(choices), "must be above 0", f"use e.g. {example}"
            )
        if not self.dropout or not all(0 <= share < 1 for share in self.dropout):
            raise SpaceError(
                "space.dropout",
                self.dropout,
                "must be 0 or more and below 1",
                "use e.g. [0.0, 0.1]",
            )
        for key in ("min_adapted_layers", "max_adapted_layers"):
            count = getattr(self, key)
            if count is not None and count < 0:
                raise SpaceError(f"space.{key}", count, f"`{key} >= 0` must hold", "use 0 or more")

    @property
    def alphas(self) -> tuple[str, tuple[float, ...]]:
        """The name of the setting that scales low-rank updates, and its choices."""
        if self.alpha is not None:
            return "alpha", self.alpha
        assert self.alpha_ratio is not None, "one of the two is set"
        return "alpha_ratio", self.alpha_ratio

    @property
    def varied(self) -> dict[str, tuple[float, ...]]:
        """The training settings, besides rates, of which there is a choice: name -> choices."""
        settings = (self.alphas, ("dropout", self.dropout))
        return {name: choices for name, choices in settings if len(choices) > 1}


def _check_override(place: str, override: MethodOverride) -> None:
    if override.ranks is not None and (not override.ranks or min(override.ranks) < 1):
        raise SpaceError(
            f"{place}.ranks", list(override.ranks), "a rank is at least 1", "use e.g. [2, 4, 8]"
        )
    if override.learning_rate is not None:
        low, high = override.learning_rate
        if not 0 < low <= high < math.inf:
            raise SpaceError(
                f"{place}.learning_rate",
                [low, high],
                "must be [lowest, highest], above 0",
                "use e.g. [1e-4, 1e-2]",
            )


def _known_roles(place: str, roles: tuple[str, ...]) -> tuple[str, ...]:
    """Return the roles, each once."""
    if not roles:
        raise SpaceError(place, roles, "must name a role", f"use {', '.join(ROLES)}")
    for role in roles:
        if role not in ROLES:
            raise SpaceError(place, role, "unknown role", nearest(role, ROLES))
    return tuple(dict.fromkeys(roles))


def _known_layers(layers: str | tuple[int, ...]) -> str | tuple[int, ...]:
    """Return the layers; block indices sorted, each once."""
    if not isinstance(layers, str) and layers:
        return tuple(sorted(set(layers)))
    if re.fullmatch(r"all|(last|first):0*[1-9][0-9]*", str(layers)):
        return layers
    raise SpaceError(
        "space.layers",
        layers,
        "must say which blocks may be adapted",
        "use all, last:4, first:4 or a list such as [0, 1, 2]",
    )


KEYS = tuple(
    each.name
    for each in fields(SpaceConfig)
    if each.name not in ("name", "is_shipped", "has_own_placements")
)
"""The keys of a search space."""


def _folder() -> Traversable:
    """Return the folder of the spaces that come with autopeft."""
    # A checkout has its own beside the package, whatever is installed.
    checkout = Path(__file__).parents[3] / "search_spaces"
    if (checkout / "default.yaml").is_file():
        return checkout
    return resources.files("autopeft.search_spaces")


def available_spaces() -> dict[str, str]:
    """Return name -> description of the search spaces that come with autopeft, sorted by name."""
    files = {
        f.name.removesuffix(".yaml"): f for f in _folder().iterdir() if f.name.endswith(".yaml")
    }
    return {name: _description(files[name].read_text(encoding="utf-8")) for name in sorted(files)}


def _description(text: str) -> str:
    """Return the leading comment of a space's file."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ").strip() for line in lines)


def read_config(source: str | Path | Mapping[str, Any]) -> SpaceConfig:
    """Read the space of that name, in that file, or in that mapping.

    Raises:
        SpaceError: if there is no such space, it is not YAML, or a key or value is invalid.
    """
    if isinstance(source, Mapping):
        return _parse(source, "custom", is_shipped=False)
    if not isinstance(source, str | os.PathLike):
        remedy = "use e.g. 'default' or {'methods': ['lora']}"
        raise SpaceError("space", source, "must be a name, a file or a mapping", remedy)
    name, file = str(source), Path(source)
    is_shipped = name in available_spaces()
    if not is_shipped and not file.is_file():
        raise SpaceError(
            "space",
            name,
            "is neither a file nor a space that comes with autopeft",
            nearest(name, available_spaces()),
        )
    row = read_yaml(
        _folder() / f"{name}.yaml" if is_shipped else file,
        field="space",
        remedy=f"use the keys {', '.join(KEYS)}",
        error=SpaceError,
    )
    return _parse(row, file.stem, is_shipped=is_shipped)


def prompt_sizes(source: str | Path | Mapping[str, Any]) -> tuple[int, ...]:
    """Return the prompt sizes of a space: only those need to be priced.

    Raises:
        SpaceError: as `read_config` and `methods.get` do.
    """
    sizes: set[int] = set()
    for name, override in read_config(source).methods.items():
        method = methods.get(name)
        if MODEL in method.roles:
            sizes.update(override.ranks or method.default_ranks)
    return tuple(sorted(sizes))


def _parse(row: Mapping[str, Any], name: str, *, is_shipped: bool) -> SpaceConfig:
    """Return the config of a space's keys; a single value may stand for a list of one."""
    for key in row:
        if key not in KEYS:
            raise SpaceError(f"space.{key}", row[key], "unknown key", nearest(key, KEYS))
    given = {key: value for key, value in row.items() if value is not None}
    given["methods"] = _overrides(given.get("methods", []))
    for key in ("roles", "alpha", "alpha_ratio", "dropout"):
        if key in given:
            given[key] = _as_list(given[key])
    has_placements = bool(given.get("placements"))
    if has_placements and isinstance(given["placements"], Mapping):
        given["placements"] = {k: _as_list(v) for k, v in given["placements"].items()}
    elif not has_placements:
        given.pop("placements", None)
    given |= {"name": name, "is_shipped": is_shipped}
    given["has_own_placements"] = has_placements and not is_shipped
    return from_plain(SpaceConfig, given, field="space", error=SpaceError)


def _overrides(methods: Any) -> Mapping[str, Any]:
    """Return a list of methods, or a mapping from methods to overrides, as such a mapping."""
    if not isinstance(methods, Mapping):
        remedy = "use e.g. [lora, ia3]"
        names = _as_list(methods)
        names = from_plain(list[str], names, field="space.methods", remedy=remedy, error=SpaceError)
        return {name: {} for name in names}
    rows = {}
    for name, override in methods.items():
        row = {} if override is None else override
        if isinstance(row, Mapping):
            row = {key: _as_list(value) for key, value in row.items() if value is not None}
            if len(row.get("learning_rate", ())) == 1:
                row["learning_rate"] = 2 * row["learning_rate"]
        rows[name] = row
    return rows


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
