"""The grid of a space over one model: its units, the options of each unit, and their cost.

A *unit* is what shares one choice: the whole model, a group of blocks, a block, or one site. An
adapter of the model as a whole (a prompt) is the choice of a unit of its own, named "plan". An
*option* is a method with a rank and a placement; option 0 is "none". A mask says which options are
legal for which unit, so that sampling, mutating and pricing are array operations.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autopeft import methods
from autopeft.costs import Topology, is_legal
from autopeft.errors import SpaceError
from autopeft.methods import Method
from autopeft.plan import MODEL, LayerSpec
from autopeft.searcher.space.config import SpaceConfig
from autopeft.serving.servers import Server

FUSED: Mapping[str, tuple[str, ...]] = {
    "attn.q": ("attn.qkv", "attn.q_b"),
    "attn.k": ("attn.qkv", "attn.kv_b"),
    "attn.v": ("attn.qkv", "attn.kv_b"),
    "mlp.gate": ("mlp.gate_up",),
    "mlp.up": ("mlp.gate_up",),
}
"""Role -> roles of modules that compute the same, and more, in models without it."""


@dataclass(frozen=True)
class Unit:
    """A part of the model that shares one choice.

    Attributes:
        name: Prefix of its parameter names, e.g. "layer.03".
        layers: Its blocks.
        roles: The roles that may be adapted.
    """

    name: str
    layers: tuple[int, ...]
    roles: tuple[str, ...]


@dataclass(frozen=True)
class Option:
    """A choice of a unit; the first option of every grid is `Option("none")`."""

    method: str
    rank: int = 0
    placement: str = ""


@dataclass(frozen=True)
class Grid:
    """All units and options of a space over one model.

    Attributes:
        units: By layer, then by role.
        options: "none" first, then sorted by method, placement and rank.
        placements: Placement name -> roles. A method whose roles no placement contains adds one.
        sites: (unit, option) -> the specs it stands for, where legal.
        legal: Mask, shape (n_units, n_options).
        params: Trainable parameters, shape (n_units, n_options); inf where not legal. Parameters
            that sites of several units share are divided equally among the units.
        spread: The shared part of `params`, same shape.
        shares: Whether an option belongs to a group of sites that share parameters, shape
            (n_units, n_options, n_groups).
        group_params: Parameters that each group shares, shape (n_groups,).
    """

    units: tuple[Unit, ...]
    options: tuple[Option, ...]
    placements: Mapping[str, tuple[str, ...]]
    sites: Mapping[tuple[int, int], tuple[LayerSpec, ...]]
    legal: NDArray[np.bool_]
    params: NDArray[np.float64]
    spread: NDArray[np.float64]
    shares: NDArray[np.bool_]
    group_params: NDArray[np.float64]

    def total_params(self, options: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the trainable parameters of options of shape (..., n_units); shape (...).

        Shared ones count once.
        """
        units = np.arange(len(self.units))
        total: NDArray[np.float64] = self.params[units, options].sum(axis=-1)
        if len(self.group_params):
            shared = self.shares[units, options].any(axis=-2) @ self.group_params
            total = np.rint(total - self.spread[units, options].sum(axis=-1) + shared)
        return total

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """Methods in use, in order of the options."""
        return tuple(dict.fromkeys(option.method for option in self.options[1:]))

    @cached_property
    def placement_names(self) -> tuple[str, ...]:
        """Placements in use, in order of the options."""
        return tuple(dict.fromkeys(option.placement for option in self.options[1:]))

    @cached_property
    def method_of(self) -> NDArray[np.int64]:
        """Index into `methods` of each option; -1 for "none"."""
        return np.array([-1, *(self.methods.index(o.method) for o in self.options[1:])])

    @cached_property
    def placement_of(self) -> NDArray[np.int64]:
        """Index into `placement_names` of each option; -1 for "none"."""
        return np.array([-1, *(self.placement_names.index(o.placement) for o in self.options[1:])])

    @cached_property
    def rank_of(self) -> NDArray[np.int64]:
        """Rank of each option; 0 for "none" and for methods without a size."""
        return np.array([option.rank for option in self.options])

    @cached_property
    def index(self) -> Mapping[Option, int]:
        """Option -> its index."""
        return {option: i for i, option in enumerate(self.options)}

    @cached_property
    def kinds(self) -> NDArray[np.int64]:
        """Distinct pairs (method, placement) of the options, as indices; shape (n_kinds, 2)."""
        pairs = np.column_stack([self.method_of, self.placement_of])[1:]
        return np.array(list(dict.fromkeys(map(tuple, pairs.tolist()))), dtype=np.int64)

    @cached_property
    def kind_of(self) -> NDArray[np.int64]:
        """Index into `kinds` of each option; -1 for "none"."""
        index = {(int(m), int(p)): kind for kind, (m, p) in enumerate(self.kinds)}
        pairs = zip(self.method_of, self.placement_of, strict=True)
        return np.array([index.get((int(m), int(p)), -1) for m, p in pairs])

    @cached_property
    def by_rank(self) -> NDArray[np.int64]:
        """Options of each kind, sorted by rank, padded with -1; shape (n_kinds, max ranks)."""
        members = [np.flatnonzero(self.kind_of == kind) for kind in range(len(self.kinds))]
        table = np.full((len(members), max(len(row) for row in members)), -1)
        for kind, row in enumerate(members):
            table[kind, : len(row)] = row[np.argsort(self.rank_of[row], kind="stable")]
        return table

    @cached_property
    def legal_kinds(self) -> NDArray[np.bool_]:
        """Whether any option of a kind is legal for a unit, shape (n_units, n_kinds)."""
        kinds = range(len(self.kinds))
        return np.stack([self.legal[:, self.kind_of == k].any(axis=1) for k in kinds], axis=1)

    @cached_property
    def nearest_cost(self) -> NDArray[np.int64]:
        """For each option, the option of each kind with the nearest cost.

        Costs are means over the units where the option is legal. Shape (n_options, n_kinds).
        """
        counts = np.maximum(self.legal.sum(axis=0), 1)
        sizes = np.log(1.0 + np.where(self.legal, self.params, 0.0).sum(axis=0) / counts)
        table = np.zeros((len(self.options), len(self.kinds)), dtype=np.int64)
        for kind in range(len(self.kinds)):
            members = np.flatnonzero(self.kind_of == kind)
            apart = np.abs(sizes[:, None] - sizes[None, members])
            table[:, kind] = members[apart.argmin(axis=1)]
        return table

    @cached_property
    def adjacent_ranks(self) -> NDArray[np.int64]:
        """Options with the next lower and next higher rank, or themselves; shape (n_options, 2)."""
        steps = np.tile(np.arange(len(self.options))[:, None], (1, 2))
        for row in self.by_rank:
            for lower, upper in itertools.pairwise(row[row >= 0]):
                steps[lower, 1], steps[upper, 0] = upper, lower
        return steps


def build_grid(config: SpaceConfig, topology: Topology, server: Server | None = None) -> Grid:
    """Return the grid of a space over a model; with a server, of what it can load.

    Raises:
        SpaceError: if the model cannot hold a method, role, layer or rank of the space, or the
            space is empty.
    """
    table = {name: methods.get(name) for name in config.methods}
    if server is not None:
        table = {name: method for name, method in table.items() if server.takes_method(method)}
        if not table:
            raise SpaceError(
                "servable",
                server.name,
                f"none of the space's methods can be served: {', '.join(config.methods)}",
                "add one that becomes a LoRA, such as lora",
            )
    placements = _placements(config, topology)
    own = {
        method.name: method.roles[0] if len(method.roles) == 1 else method.name
        for method in table.values()
        if not any(_applies(method, roles) for roles in placements.values())
    }
    placements |= {place: table[name].roles for name, place in own.items()}
    units = _units(config, topology, placements, table)
    options = [Option("none")]
    for name, method in table.items():
        fitting = [p for p in placements if _applies(method, placements[p])]
        places = _distinct([own[name]] if name in own else fitting, placements, method)
        ranks = config.methods[name].ranks or method.default_ranks
        if not method.takes_rank:
            if config.methods[name].ranks is not None:
                raise SpaceError(
                    f"space.methods.{name}.ranks",
                    list(config.methods[name].ranks or ()),
                    f"{name} has no size",
                    "drop the key",
                )
            ranks = (0,)
        _check_ranks(config, method, [placements[p] for p in places], topology)
        options += [Option(name, rank, place) for place in places for rank in sorted(ranks)]
    is_lenient = config.is_shipped or server is not None
    return _fill(units, options, placements, table, topology, server, is_lenient=is_lenient)


def _applies(method: Method, roles: Sequence[str]) -> bool:
    return any(role in method.roles for role in roles)


def _distinct(
    places: Sequence[str], placements: Mapping[str, tuple[str, ...]], method: Method
) -> list[str]:
    """Drop placements that are equal for a method, because they differ in roles it cannot adapt."""
    seen: dict[tuple[str, ...], str] = {}
    for place in places:
        seen.setdefault(tuple(r for r in placements[place] if r in method.roles), place)
    return list(seen.values())


def _has_role(topology: Topology, role: str) -> bool:
    return any(topology.shape(layer, role) is not None for layer in range(topology.n_layers))


def _present(topology: Topology, roles: Sequence[str]) -> tuple[str, ...]:
    """Return the roles the model has; a fused module replaces its parts."""
    found = [
        each
        for role in roles
        for each in ((role,) if _has_role(topology, role) else FUSED.get(role, (role,)))
    ]
    return tuple(role for role in dict.fromkeys(found) if _has_role(topology, role))


def _placements(config: SpaceConfig, topology: Topology) -> dict[str, tuple[str, ...]]:
    """Return the placements of roles the model has; with granularity "site", one per role."""
    has = [role for role in topology.shapes if _has_role(topology, role)]
    problem = ("the model has none of these roles", f"use {', '.join(has)}")
    allowed: tuple[str, ...] | None = None
    if config.roles is not None:
        allowed = _present(topology, config.roles)
        if not allowed:
            raise SpaceError("space.roles", list(config.roles), *problem)
    result: dict[str, tuple[str, ...]] = {}
    for name, roles in config.placements.items():
        present = _present(topology, roles)
        if not present and config.has_own_placements:
            raise SpaceError(f"space.placements.{name}", list(roles), *problem)
        kept = tuple(r for r in present if allowed is None or r in allowed)
        if kept and kept not in result.values():
            result[name] = kept
    if allowed is not None and not result:
        result["roles"] = allowed
    if config.granularity == "site":
        single = dict.fromkeys(role for roles in result.values() for role in roles)
        return {role: (role,) for role in single}
    return result


def _layers(config: SpaceConfig, topology: Topology) -> list[int]:
    blocks = list(range(topology.n_layers))
    if isinstance(config.layers, tuple):
        for layer in config.layers:
            if not 0 <= layer < topology.n_layers:
                raise SpaceError(
                    "space.layers",
                    layer,
                    f"the model has blocks 0 to {topology.n_layers - 1}",
                    "name one of these",
                )
        return list(config.layers)
    kind, _, count = config.layers.partition(":")
    if kind == "all":
        return blocks
    if int(count) > topology.n_layers:
        raise SpaceError(
            "space.layers", config.layers, f"the model has {topology.n_layers} blocks", "use fewer"
        )
    return blocks[-int(count) :] if kind == "last" else blocks[: int(count)]


def _units(
    config: SpaceConfig,
    topology: Topology,
    placements: Mapping[str, tuple[str, ...]],
    table: Mapping[str, Method],
) -> tuple[Unit, ...]:
    named = dict.fromkeys(role for place in placements.values() for role in place)
    roles = tuple(role for role in named if _has_role(topology, role))
    if MODEL not in roles:
        return _block_units(config, topology, roles)
    # Leave out roles that no method but a prompt adapts.
    used = {role for method in table.values() for role in method.roles} - {MODEL}
    blocks = _block_units(config, topology, tuple(role for role in roles if role in used))
    return (Unit("plan", (0,), (MODEL,)), *blocks)


def _block_units(
    config: SpaceConfig, topology: Topology, roles: tuple[str, ...]
) -> tuple[Unit, ...]:
    if not roles:
        return ()
    layers = _layers(config, topology)
    width = max(2, len(str(topology.n_layers - 1)))
    if config.granularity == "site":
        return tuple(
            Unit(f"layer.{layer:0{width}d}.{role}", (layer,), (role,))
            for layer in layers
            for role in roles
            if topology.shape(layer, role) is not None
        )
    if config.granularity == "layer":
        return tuple(Unit(f"layer.{layer:0{width}d}", (layer,), roles) for layer in layers)
    if config.granularity == "model":
        return (Unit("model", tuple(layers), roles),)
    size = int(config.granularity.removeprefix("group:"))
    groups = [layers[start : start + size] for start in range(0, len(layers), size)]
    return tuple(
        Unit(f"layers.{group[0]:0{width}d}-{group[-1]:0{width}d}", tuple(group), roles)
        for group in groups
    )


def _check_ranks(
    config: SpaceConfig, method: Method, places: Sequence[tuple[str, ...]], topology: Topology
) -> None:
    """Check that ranks given by the user are legal at every site; default ranks may not be."""
    ranks = config.methods[method.name].ranks
    if ranks is None or config.is_shipped:
        return
    roles = dict.fromkeys(role for place in places for role in place if role in method.roles)
    for role in roles:
        for layer in (0,) if role == MODEL else _layers(config, topology):
            shape = topology.shape(layer, role)
            for rank in ranks:
                if shape is not None and not method.is_legal_rank(rank, shape):
                    raise SpaceError(
                        f"space.methods.{method.name}.ranks",
                        rank,
                        f"{method.rank_rule(shape)} at layer {layer} ({role})",
                        "leave it out",
                    )


def _fill(
    units: Sequence[Unit],
    options: Sequence[Option],
    placements: Mapping[str, tuple[str, ...]],
    table: Mapping[str, Method],
    topology: Topology,
    server: Server | None,
    *,
    is_lenient: bool,
) -> Grid:
    sites: dict[tuple[int, int], tuple[LayerSpec, ...]] = {}
    params = np.full((len(units), len(options)), np.inf)
    for u, unit in enumerate(units):
        sites[u, 0] = ()
        params[u, 0] = 0.0
        for o, option in enumerate(options[1:], start=1):
            method = table[option.method]
            roles = [r for r in placements[option.placement] if r in method.roles]
            shapes = {
                LayerSpec(layer, role, option.method, option.rank): shape
                for layer, role in itertools.product(unit.layers, roles)
                if role in unit.roles and (shape := topology.shape(layer, role)) is not None
            }
            is_served = server is None or all(
                server.takes(method, spec.rank, spec.role, shape) for spec, shape in shapes.items()
            )
            if shapes and is_served and all(is_legal(topology, spec) for spec in shapes):
                sites[u, o] = tuple(shapes)
                params[u, o] = sum(
                    method.n_params(spec.rank, shape, spec.role) for spec, shape in shapes.items()
                )
    legal = np.isfinite(params)
    used = legal.any(axis=0)
    spread, shares, group_params = _shared(sites, topology, params.shape)
    params += spread
    if not used[1:].any():
        raise SpaceError(
            "space",
            [option.method for option in options[1:]][:4],
            "no method fits anywhere in the model"
            + (f" and can be served by {server.name}" if server else "")
            + ": the space is empty",
            "add methods, roles or smaller ranks",
        )
    for name in () if is_lenient else table:
        if not any(used[o] for o, option in enumerate(options) if option.method == name):
            raise SpaceError(
                f"space.methods.{name}",
                name,
                _why_nowhere(table[name], topology),
                "leave it out or add the role",
            )
    # Drop options that are legal nowhere, such as default ranks that are too large.
    kept = [int(o) for o in np.flatnonzero(used)]
    new = {old: place for place, old in enumerate(kept)}
    return Grid(
        tuple(units),
        tuple(options[o] for o in kept),
        dict(placements),
        {(u, new[o]): specs for (u, o), specs in sites.items()},
        legal[:, kept],
        params[:, kept],
        spread[:, kept],
        shares[:, kept],
        group_params,
    )


def _why_nowhere(method: Method, topology: Topology) -> str:
    shape = topology.shape(0, MODEL)
    if method.roles == (MODEL,) and shape is not None:
        return f"fits nowhere in the model: {method.rank_rule(shape)}"
    return f"fits nowhere in the model: it needs one of {', '.join(method.roles)}"


def _shared(
    sites: Mapping[tuple[int, int], tuple[LayerSpec, ...]],
    topology: Topology,
    shape: tuple[int, ...],
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """Return `spread`, `shares` and `group_params` of a grid."""
    groups: dict[tuple[str, int, int], set[tuple[int, int]]] = {}
    for place, specs in sites.items():
        for spec in specs:
            method, site = methods.get(spec.method), topology.shape(spec.layer, spec.role)
            if method.shared_state and site is not None:
                group = (spec.method, spec.rank, method.pool(site))
                groups.setdefault(group, set()).add(place)
    sizes = {group: float(methods.get(group[0]).shared_params(*group[1:])) for group in groups}
    sizes = {group: size for group, size in sizes.items() if size}
    spread, shares = np.zeros(shape), np.zeros((*shape, len(sizes)), dtype=bool)
    for g, (group, size) in enumerate(sizes.items()):
        units = len({unit for unit, _ in groups[group]})
        for place in groups[group]:
            shares[(*place, g)] = True
            spread[place] += size / units
    return spread, shares, np.array(list(sizes.values()))
