"""Reading and checking the YAML of a search space."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from autopeft import methods
from autopeft.errors import SpaceError
from autopeft.plan import MODEL, ROLES

KEYS = (
    "methods",
    "granularity",
    "roles",
    "placements",
    "layers",
    "alpha_ratio",
    "dropout",
    "include_empty",
    "min_adapted_layers",
    "max_adapted_layers",
)
"""The keys of a search space."""

DEFAULT_PLACEMENTS: Mapping[str, tuple[str, ...]] = {
    "qv": ("attn.q", "attn.v"),
    "attention": ("attn.q", "attn.k", "attn.v", "attn.o"),
    "mlp": ("mlp.up", "mlp.gate", "mlp.down"),
    "all": ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.gate", "mlp.down"),
}
"""Placements of a space that defines none."""


@dataclass(frozen=True)
class MethodOverride:
    """The ranks and the learning rates that a space sets for a method; None keeps the default."""

    ranks: tuple[int, ...] | None = None
    learning_rate: tuple[float, float] | None = None


@dataclass(frozen=True)
class SpaceConfig:
    """A search space as written: checked for form, but not against a model.

    Attributes:
        methods: Method name -> overrides.
        granularity: "model", "group:K", "layer" or "site": the parts that share one choice.
        roles: Allowed roles; None for all roles of the placements.
        placements: Name -> roles that are adapted together.
        layers: "all", "last:K", "first:K" or block indices.
        alpha_ratio: Choices.
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
    alpha_ratio: tuple[float, ...] = (2.0,)
    dropout: tuple[float, ...] = (0.0,)
    include_empty: bool = False
    min_adapted_layers: int = 0
    max_adapted_layers: int | None = None
    name: str = "space"
    is_shipped: bool = False
    has_own_placements: bool = False


def _folder() -> Traversable:
    """Return the folder of the spaces that come with autopeft."""
    try:
        return resources.files("autopeft.search_spaces")
    except ModuleNotFoundError:
        # A checkout that was not installed: the folder beside the package.
        return Path(__file__).parents[2] / "search_spaces"


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
    text, is_shipped = _text(source)
    try:
        row = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpaceError("space", str(source), f"not YAML: {error}", "repair the file") from None
    if not isinstance(row, Mapping):
        raise SpaceError(
            "space", str(source), "a space is a mapping of keys to values", f"use {', '.join(KEYS)}"
        )
    return _parse(row, Path(str(source)).stem, is_shipped=is_shipped)


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


def _text(source: str | Path) -> tuple[str, bool]:
    """Return the YAML text, and whether it comes with autopeft."""
    name = str(source)
    if name in available_spaces():
        packaged = _folder() / f"{name}.yaml"
        return packaged.read_text(encoding="utf-8"), True
    path = Path(name)
    if not path.is_file():
        raise SpaceError(
            "space",
            name,
            "neither a file nor a space that comes with autopeft"
            + _nearest(name, available_spaces()),
            f"use a YAML file or one of {', '.join(available_spaces())}",
        )
    try:
        return path.read_text(encoding="utf-8"), False
    except (OSError, UnicodeDecodeError) as error:
        raise SpaceError("space", name, f"cannot be read: {error}", "check the file") from None


def _nearest(word: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _parse(row: Mapping[str, Any], name: str, *, is_shipped: bool) -> SpaceConfig:
    for key in row:
        if key not in KEYS:
            raise SpaceError(
                f"space.{key}",
                row[key],
                "no such key" + _nearest(key, KEYS),
                f"use {', '.join(KEYS)}",
            )
    if not row.get("methods"):
        raise SpaceError(
            "space.methods", row.get("methods"), "a space needs a method", "name one, e.g. lora"
        )
    defaults = SpaceConfig({})
    placements = row.get("placements") or defaults.placements
    return SpaceConfig(
        methods=_methods(row["methods"]),
        granularity=_granularity(row.get("granularity", "layer")),
        roles=None if row.get("roles") is None else _roles("space.roles", row["roles"]),
        placements=_placements(placements),
        layers=_layers(row.get("layers", "all")),
        alpha_ratio=_numbers(
            "space.alpha_ratio", row.get("alpha_ratio", 2.0), low=0.0, open_low=True
        ),
        dropout=_numbers("space.dropout", row.get("dropout", 0.0), low=0.0, high=1.0),
        include_empty=_flag("space.include_empty", row.get("include_empty", False)),
        min_adapted_layers=_count("space.min_adapted_layers", row.get("min_adapted_layers", 0)),
        max_adapted_layers=None
        if row.get("max_adapted_layers") is None
        else _count("space.max_adapted_layers", row["max_adapted_layers"]),
        name=name,
        is_shipped=is_shipped,
        has_own_placements=not is_shipped and bool(row.get("placements")),
    )


def _methods(value: Any) -> dict[str, MethodOverride]:
    if isinstance(value, str):
        value = [value]
    if isinstance(value, Mapping):
        return {str(name): _override(str(name), keys or {}) for name, keys in value.items()}
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return {name: MethodOverride() for name in value}
    raise SpaceError(
        "space.methods", value, "a list of method names, or a mapping of them", "e.g. [lora, ia3]"
    )


def _override(name: str, keys: Any) -> MethodOverride:
    place = f"space.methods.{name}"
    if not isinstance(keys, Mapping):
        raise SpaceError(
            place, keys, "a mapping with ranks and learning_rate", "e.g. {ranks: [4, 8]}"
        )
    for key in keys:
        if key not in ("ranks", "learning_rate"):
            raise SpaceError(
                f"{place}.{key}", keys[key], "no such key", "use ranks or learning_rate"
            )
    ranks: tuple[int, ...] | None = None
    if keys.get("ranks") is not None:
        value = keys["ranks"]
        value = list(value) if isinstance(value, list | tuple) else [value]
        if not value or not all(
            isinstance(r, int) and not isinstance(r, bool) and r > 0 for r in value
        ):
            raise SpaceError(
                f"{place}.ranks", value, "whole numbers of at least 1", "e.g. [2, 4, 8]"
            )
        ranks = tuple(sorted(set(value)))
    rates: tuple[float, float] | None = None
    if keys.get("learning_rate") is not None:
        bounds = _numbers(f"{place}.learning_rate", keys["learning_rate"], low=0.0, open_low=True)
        if len(bounds) > 2 or bounds[0] > bounds[-1]:
            raise SpaceError(
                f"{place}.learning_rate", list(bounds), "[lowest, highest]", "e.g. [1.0e-4, 1.0e-2]"
            )
        rates = (bounds[0], bounds[-1])
    return MethodOverride(ranks, rates)


def _granularity(value: Any) -> str:
    text = str(value)
    size = text.removeprefix("group:")
    if text in ("model", "layer", "site") or (text != size and size.isdigit() and int(size) > 0):
        return text
    raise SpaceError(
        "space.granularity", value, "what shares one choice", "use model, group:4, layer or site"
    )


def _roles(place: str, value: Any) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names:
        raise SpaceError(place, value, "a list of roles", f"use {', '.join(ROLES)}")
    for role in names:
        if role not in ROLES:
            raise SpaceError(
                place, role, "no such role" + _nearest(role, ROLES), f"use {', '.join(ROLES)}"
            )
    return tuple(dict.fromkeys(names))


def _placements(value: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, Mapping) or not value:
        raise SpaceError(
            "space.placements",
            value,
            "a mapping of names to lists of roles",
            "e.g. {qv: [attn.q, attn.v]}",
        )
    return {str(name): _roles(f"space.placements.{name}", roles) for name, roles in value.items()}


def _layers(value: Any) -> str | tuple[int, ...]:
    remedy = "use all, last:4, first:4 or a list such as [0, 1, 2]"
    if isinstance(value, list | tuple):
        if not value or not all(isinstance(n, int) and not isinstance(n, bool) for n in value):
            raise SpaceError("space.layers", value, "a list of block indices", remedy)
        return tuple(sorted(set(value)))
    text = str(value)
    kind, _, count = text.partition(":")
    if text == "all" or (kind in ("last", "first") and count.isdigit() and int(count) > 0):
        return text
    raise SpaceError("space.layers", value, "which blocks may be adapted", remedy)


def _numbers(
    place: str, value: Any, *, low: float, high: float = float("inf"), open_low: bool = False
) -> tuple[float, ...]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    numbers = []
    for item in values:
        try:
            # YAML 1.1 reads 1e-3 (without a point) as text.
            number = float("nan") if isinstance(item, bool) else float(item)
        except (TypeError, ValueError):
            number = float("nan")
        if not (low < number < high if open_low else low <= number < high):
            bound = ">" if open_low else ">="
            raise SpaceError(place, item, f"a number {bound} {low} and below {high}", "correct it")
        numbers.append(number)
    if not numbers:
        raise SpaceError(place, value, "needs one value at least", "give a number or a list")
    return tuple(numbers)


def _flag(place: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise SpaceError(place, value, "true or false", "use true or false")
    return value


def _count(place: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise SpaceError(place, value, "a whole number of at least 0", "correct it")
    return value
