"""The grid a space spans over one model: units that choose, options to choose from, and their cost.

A *unit* is what shares one choice: the whole model, a group of blocks, a block, or one site; an
adapter of the model as a whole is a choice of its own, made once, by a unit named "plan". An
*option* is a method with a rank and a placement; option 0 is "none". Which options a unit may take
is a mask, so that drawing, mutating and pricing are array work.
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
from autopeft.searcher.space.config import SpaceSource

FUSED: Mapping[str, str] = {
    "attn.q": "attn.qkv",
    "attn.k": "attn.qkv",
    "attn.v": "attn.qkv",
    "mlp.gate": "mlp.gate_up",
    "mlp.up": "mlp.gate_up",
}
"""Where a model fuses modules, the role that stands in for each of them."""


@dataclass(frozen=True)
class Unit:
    """What shares one choice.

    Attributes:
        name: As in parameter names, e.g. "layer.03".
        layers: Its blocks.
        roles: The roles it may adapt.
    """

    name: str
    layers: tuple[int, ...]
    roles: tuple[str, ...]


@dataclass(frozen=True)
class Option:
    """One choice of a unit; the first option of every grid is `Option("none")`."""

    method: str
    rank: int = 0
    placement: str = ""


@dataclass(frozen=True)
class Grid:
    """All units and options of a space over one model.

    Attributes:
        units: In reading order.
        options: "none" first, then method by method, placement by placement, rank upwards.
        placements: Placement name -> roles; methods at roles of their own add one each.
        sites: (unit, option) -> the specs it stands for, where legal.
        legal: Shape (n_units, n_options).
        params: Trainable parameters of a unit's option, shape (n_units, n_options); inf where not
            legal. What its sites share with those of other units is spread over all units.
        spread: What of `params` is such a share, same shape.
        shares: Whether a unit's option takes part in a group of sites that share parameters, shape
            (n_units, n_options, n_groups).
        group_params: Parameters each group shares, shape (n_groups,).
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
        """Trainable parameters of plans: exact, what sites share counted once.

        Args:
            options: Shape (..., n_units).

        Returns:
            Shape (...).
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
        """Pairs (method, placement) there are options for, as indices; shape (n_kinds, 2)."""
        pairs = np.column_stack([self.method_of, self.placement_of])[1:]
        return np.array(list(dict.fromkeys(map(tuple, pairs.tolist()))), dtype=np.int64)

    @cached_property
    def kind_of(self) -> NDArray[np.int64]:
        """Index into `kinds` of each option; -1 for "none"."""
        index = {(int(m), int(p)): kind for kind, (m, p) in enumerate(self.kinds)}
        pairs = zip(self.method_of, self.placement_of, strict=True)
        return np.array([index.get((int(m), int(p)), -1) for m, p in pairs])

    @cached_property
    def rungs(self) -> NDArray[np.int64]:
        """The options of each kind by rank, padded with -1; shape (n_kinds, most ranks)."""
        members = [np.flatnonzero(self.kind_of == kind) for kind in range(len(self.kinds))]
        table = np.full((len(members), max(len(row) for row in members)), -1)
        for kind, row in enumerate(members):
            table[kind, : len(row)] = row[np.argsort(self.rank_of[row], kind="stable")]
        return table

    @cached_property
    def legal_kinds(self) -> NDArray[np.bool_]:
        """Whether a unit may take any option of a kind, shape (n_units, n_kinds)."""
        columns = [
            self.legal[:, self.kind_of == kind].any(axis=1) for kind in range(len(self.kinds))
        ]
        return np.stack(columns, axis=1)

    @cached_property
    def nearest(self) -> NDArray[np.int64]:
        """The option of each kind that costs most nearly what an option costs.

        Costs are means over the units that may take the option. Shape (n_options, n_kinds).
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
    def ladder(self) -> NDArray[np.int64]:
        """The options with one rank less and one rank more, or themselves; shape (n_options, 2)."""
        steps = np.tile(np.arange(len(self.options))[:, None], (1, 2))
        for row in self.rungs:
            for lower, upper in itertools.pairwise(row[row >= 0]):
                steps[lower, 1], steps[upper, 0] = upper, lower
        return steps


def build_grid(source: SpaceSource, topology: Topology) -> Grid:
    """The grid of a space over a model.

    Raises:
        SpaceError: if the space names a method, role, layer or rank the model cannot hold, or
            leaves nothing to choose.
    """
    table = {name: methods.get(name) for name in source.methods}
    placements = _placements(source, topology)
    units = _units(source, topology, placements, table)
    own = {
        method.name: f"{method.roles[0]}" if len(method.roles) == 1 else method.name
        for method in table.values()
        if not any(_sits(method, roles) for roles in placements.values())
    }
    for name, place in own.items():
        placements[place] = table[name].roles
    options = [Option("none")]
    for name, method in table.items():
        places = (
            [own[name]] if name in own else [p for p in placements if _sits(method, placements[p])]
        )
        places = _distinct(places, placements, method)
        ranks = source.methods[name].ranks or method.default_ranks
        if not method.takes_rank:
            if source.methods[name].ranks is not None:
                raise SpaceError(
                    f"space.methods.{name}.ranks",
                    list(source.methods[name].ranks or ()),
                    f"{name} has no size",
                    "drop the key",
                )
            ranks = (0,)
        _check_ranks(source, method, [placements[p] for p in places], topology)
        options += [Option(name, rank, place) for place in places for rank in sorted(ranks)]
    return _fill(units, options, placements, table, topology, is_lenient=source.is_shipped)


def _sits(method: Method, roles: Sequence[str]) -> bool:
    return any(role in method.roles for role in roles)


def _distinct(
    places: Sequence[str], placements: Mapping[str, tuple[str, ...]], method: Method
) -> list[str]:
    """Placements that differ once roles the method cannot take are dropped."""
    seen: dict[tuple[str, ...], str] = {}
    for place in places:
        seen.setdefault(tuple(r for r in placements[place] if r in method.roles), place)
    return list(seen.values())


def _has_role(topology: Topology, role: str) -> bool:
    return any(topology.shape(layer, role) is not None for layer in range(topology.n_layers))


def _present(topology: Topology, roles: Sequence[str]) -> tuple[str, ...]:
    """Those roles the model has, a fused module standing in for its parts."""
    found = []
    for role in roles:
        for name in (role, FUSED.get(role, role)):
            if _has_role(topology, name):
                found.append(name)
                break
    return tuple(dict.fromkeys(found))


def _placements(source: SpaceSource, topology: Topology) -> dict[str, tuple[str, ...]]:
    """The placements as the model can hold them; by site, one placement a role."""
    has = [role for role in topology.shapes if _has_role(topology, role)]
    allowed: tuple[str, ...] | None = None
    if source.roles is not None:
        allowed = _present(topology, source.roles)
        if not allowed:
            raise SpaceError(
                "space.roles",
                list(source.roles),
                "the model has none of them",
                f"use {', '.join(has)}",
            )
    result: dict[str, tuple[str, ...]] = {}
    for name, roles in source.placements.items():
        present = _present(topology, roles)
        if not present and source.has_own_placements:
            raise SpaceError(
                f"space.placements.{name}",
                list(roles),
                "the model has none of these roles",
                f"use {', '.join(has)}",
            )
        kept = tuple(r for r in present if allowed is None or r in allowed)
        if kept and kept not in result.values():
            result[name] = kept
    if allowed is not None and not result:
        result["roles"] = allowed
    if source.granularity == "site":
        single = dict.fromkeys(role for roles in result.values() for role in roles)
        return {role: (role,) for role in single}
    return result


def _layers(source: SpaceSource, topology: Topology) -> list[int]:
    blocks = list(range(topology.n_layers))
    if isinstance(source.layers, tuple):
        for layer in source.layers:
            if not 0 <= layer < topology.n_layers:
                raise SpaceError(
                    "space.layers",
                    layer,
                    f"the model has blocks 0 to {topology.n_layers - 1}",
                    "name one of these",
                )
        return list(source.layers)
    kind, _, count = source.layers.partition(":")
    if kind == "all":
        return blocks
    if int(count) > topology.n_layers:
        raise SpaceError(
            "space.layers", source.layers, f"the model has {topology.n_layers} blocks", "use fewer"
        )
    return blocks[-int(count) :] if kind == "last" else blocks[: int(count)]


def _units(
    source: SpaceSource,
    topology: Topology,
    placements: Mapping[str, tuple[str, ...]],
    table: Mapping[str, Method],
) -> tuple[Unit, ...]:
    own = [
        r
        for m in table.values()
        for r in m.roles
        if not any(_sits(m, p) for p in placements.values())
    ]
    roles = tuple(dict.fromkeys([*(r for p in placements.values() for r in p), *own]))
    roles = tuple(role for role in roles if _has_role(topology, role))
    if MODEL not in roles:
        return _block_units(source, topology, roles)
    # What only a prompt could adapt, or nothing could, is no choice.
    used = {role for method in table.values() for role in method.roles} - {MODEL}
    blocks = _block_units(source, topology, tuple(role for role in roles if role in used))
    return (Unit("plan", (0,), (MODEL,)), *blocks)


def _block_units(
    source: SpaceSource, topology: Topology, roles: tuple[str, ...]
) -> tuple[Unit, ...]:
    if not roles:
        return ()
    layers = _layers(source, topology)
    width = max(2, len(str(topology.n_layers - 1)))
    if source.granularity == "site":
        return tuple(
            Unit(f"layer.{layer:0{width}d}.{role}", (layer,), (role,))
            for layer in layers
            for role in roles
            if topology.shape(layer, role) is not None
        )
    if source.granularity == "layer":
        return tuple(Unit(f"layer.{layer:0{width}d}", (layer,), roles) for layer in layers)
    if source.granularity == "model":
        return (Unit("model", tuple(layers), roles),)
    size = int(source.granularity.removeprefix("group:"))
    groups = [layers[start : start + size] for start in range(0, len(layers), size)]
    return tuple(
        Unit(f"layers.{group[0]:0{width}d}-{group[-1]:0{width}d}", tuple(group), roles)
        for group in groups
    )


def _check_ranks(
    source: SpaceSource,
    method: Method,
    places: Sequence[tuple[str, ...]],
    topology: Topology,
) -> None:
    """Ranks the user wrote must fit every site they may go to; others are left out where not."""
    ranks = source.methods[method.name].ranks
    if ranks is None or source.is_shipped:
        return
    roles = dict.fromkeys(role for place in places for role in place if role in method.roles)
    for role in roles:
        for layer in (0,) if role == MODEL else _layers(source, topology):
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
            specs: list[LayerSpec] = []
            total = 0
            for layer in unit.layers:
                for role in placements[option.placement]:
                    shape = topology.shape(layer, role)
                    if shape is None or role not in method.roles or role not in unit.roles:
                        continue
                    spec = LayerSpec(layer, role, option.method, option.rank)
                    if not is_legal(topology, spec):
                        specs = []
                        break
                    specs.append(spec)
                    total += method.n_params(option.rank, shape, role)
                else:
                    continue
                break
            if specs:
                sites[u, o] = tuple(specs)
                params[u, o] = total
    legal = np.isfinite(params)
    used = legal.any(axis=0)
    spread, shares, group_params = _shared(sites, topology, params.shape)
    params += spread
    if not used[1:].any():
        raise SpaceError(
            "space",
            [option.method for option in options[1:]][:4],
            "no method fits anywhere in the model: the space is empty",
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
    # A default rank no module can hold leaves the grid, so that columns are all meaningful.
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
    """`spread`, `shares` and `group_params` of a grid."""
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
