"""Find where adapters can go in a transformer: role -> module paths and shapes.

It works on any device, `meta` included, without a list of architectures. Blocks are the elements of
the module list whose elements all contain attention, or some of them in a hybrid. Roles follow from
the names of linear modules in transformers, or from a `role_map` where these names are unknown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from autopeft.costs import Shape, Topology
from autopeft.errors import ModelError
from autopeft.methods import EXPERT_ROLES
from autopeft.models.sites import attention_shape, prompt_site
from autopeft.plan import MODEL, ROLES

RoleMap = Mapping[str, str | Sequence[str]]
"""Role -> path of its module inside a block, or the end of that path.

The key "blocks" gives the path of the module list (or lists, an encoder's first).
"""

Site = tuple[int, str]

_FOUND_FROM_OTHERS = (MODEL, "attn", "block")
"""Roles whose modules contain the modules of other roles."""

_NOT_MAPPED = (*_FOUND_FROM_OTHERS, *EXPERT_ROLES)

_ATTENTION_LEAVES: Mapping[str, tuple[str, ...]] = {
    "q": ("q_proj", "query", "query_proj", "q", "q_lin", "wq", "to_q"),
    "k": ("k_proj", "key", "key_proj", "k", "k_lin", "wk", "to_k"),
    "v": ("v_proj", "value", "value_proj", "v", "v_lin", "wv", "to_v"),
    "qkv": ("c_attn", "query_key_value", "qkv_proj", "qkv", "wqkv", "in_proj"),
    "q_a": ("q_a_proj",),
    "q_b": ("q_b_proj",),
    "kv_a": ("kv_a_proj_with_mqa",),
    "kv_b": ("kv_b_proj",),
    "o": ("o_proj", "out_proj", "out_lin", "o", "c_proj", "dense", "wo", "to_out", "proj"),
}
_MLP_LEAVES: Mapping[str, tuple[str, ...]] = {
    "mlp.up": (
        *("up_proj", "fc1", "lin1", "wi", "wi_1", "c_fc", "fc_in", "dense_h_to_4h"),
        *("ffn", "w3", "linear1", "intermediate_dense"),
    ),
    "mlp.gate": ("gate_proj", "wi_0", "w1"),
    "mlp.gate_up": ("gate_up_proj",),
    "mlp.down": (
        *("down_proj", "fc2", "lin2", "wo", "c_proj", "fc_out", "dense_4h_to_h"),
        *("ffn_output", "w2", "linear2", "output_dense"),
    ),
}
_EXPERT_PARAMETERS: Mapping[str, str] = {
    "gate_up_proj": "experts.gate_up",
    "up_proj": "experts.up",
    "down_proj": "experts.down",
}
"""Name of a parameter with three axes, the first one the experts -> role."""

_CROSS = re.compile(r"cross|encdec|encoder_att|encoder_decoder_att")


def roles_of_name(name: str) -> tuple[str, ...]:
    """Return the roles that a linear module of that name has in some architecture.

    Example:
        >>> from autopeft.models.layout import roles_of_name
        >>> roles_of_name("q_proj"), roles_of_name("c_proj")
        (('attn.q',), ('attn.o', 'mlp.down'))
    """
    attention = [f"attn.{part}" for part, leaves in _ATTENTION_LEAVES.items() if name in leaves]
    return (*attention, *(role for role, leaves in _MLP_LEAVES.items() if name in leaves))


@dataclass(frozen=True)
class Layout:
    """A model's topology and the modules behind it.

    Attributes:
        topology: The shapes.
        blocks: Layer -> path of its block.
        modules: (layer, role) -> paths of its modules: one, but all of the block's for "norm". At
            "attn", "block" and "model" the module contains those of other roles. At roles of
            experts it is the path of a parameter.
        unsearched: Path inside a block, "*" for numbers -> the share of all the blocks' parameters
            that have no role there, largest first: routers of experts, state spaces.
        experts: Role of experts -> its share of all the blocks' parameters.
    """

    topology: Topology
    blocks: tuple[str, ...]
    modules: Mapping[Site, tuple[str, ...]]
    unsearched: Mapping[str, float] = field(default_factory=dict)
    experts: Mapping[str, float] = field(default_factory=dict)


def find_layout(
    model: nn.Module, *, role_map: RoleMap | None = None, head_params: int = 0, name: str = ""
) -> Layout:
    """Find the layout of a transformer.

    Args:
        model: Any encoder, decoder or encoder-decoder of transformers.
        role_map: Overrides the roles found by name.
        head_params: Parameters trained besides the adapters.
        name: Name of the model in errors.

    Raises:
        ModelError: if no blocks with attention are found.
    """
    role_map = role_map or {}
    name = name or type(model).__name__
    known = ["blocks", *(role for role in ROLES if role not in _NOT_MAPPED)]
    for role in role_map:
        if role not in known:
            raise ModelError(
                "role_map",
                role,
                "is not a role that can be mapped",
                f"use one of {', '.join(known)}",
            )
    lists = _block_lists(model, role_map, name)
    blocks = [f"{path}.{i}" for path, size in lists for i in range(size)]
    modules: dict[Site, tuple[str, ...]] = {}
    shapes: dict[Site, Shape] = {}
    transposed: set[str] = set()
    for layer, path in enumerate(blocks):
        block = model.get_submodule(path)
        for role, inner in _roles_of(block, role_map).items():
            found = [block.get_submodule(each) for each in inner]
            modules[layer, role] = tuple(f"{path}.{each}" if each else path for each in inner)
            shapes[layer, role] = _shape(role, found)
            if any(isinstance(module, Conv1D) for module in found):
                transposed.add(role)
        for role, (inner_path, shape) in _experts_of(block).items():
            modules[layer, role], shapes[layer, role] = (f"{path}.{inner_path}",), shape
        attention = _self_attention(path, layer, modules)
        heads = attention_shape(model.get_submodule(attention)) if attention else None
        if heads is not None and heads[1] == shapes[layer, "attn.o"][1]:
            modules[layer, "attn"] = (attention,)
            shapes[layer, "attn"] = heads
        width = next((s[1] for (at, r), s in shapes.items() if at == layer and r != "norm"), 0)
        if width:
            modules[layer, "block"] = (path,)
            shapes[layer, "block"] = (width, width)
    site = prompt_site(model, blocks)
    if site is not None:
        modules[0, MODEL], shapes[0, MODEL] = (site[0],), site[1]
    return Layout(
        topology=_topology(
            model,
            len(blocks),
            shapes,
            head_params=head_params,
            n_encoder_layers=lists[0][1] if len(lists) > 1 and _is_encoder_decoder(model) else 0,
            transposed_roles=tuple(role for role in ROLES if role in transposed),
        ),
        blocks=tuple(blocks),
        modules=modules,
        unsearched=_unsearched(model, blocks, modules),
        experts=_expert_shares(model, blocks, shapes),
    )


def check_role_map(model: nn.Module, layout: Layout, role_map: RoleMap | None) -> None:
    """Check that each role of a map is that of a module in some block: else it has no effect.

    For the settings of a search. What an adapter was saved with is taken as it is.

    Args:
        model: The model.
        layout: As found with the map.
        role_map: As for `find_layout`.

    Raises:
        ModelError: naming the role, its path, and the paths that there are.
    """
    given = {role: paths for role, paths in (role_map or {}).items() if role != "blocks"}
    used = {
        _mapped_role(path.removeprefix(f"{layout.blocks[layer]}."), given)
        for (layer, role), paths in layout.modules.items()
        if role not in _FOUND_FROM_OTHERS
        for path in paths
    }
    for role, suffixes in given.items():
        if role in used:
            continue
        paths = [
            re.sub(r"\.\d+(?=\.|$)", ".*", path)
            for block in dict.fromkeys(layout.blocks)
            for path, module in model.get_submodule(block).named_modules()
            if path and (_is_norm(module) if role == "norm" else _is_linear(module))
        ]
        known = [*dict.fromkeys(paths)]
        taken = [path for path in known if _mapped_role(path, given) == role]
        kind = "norm" if role == "norm" else "linear module"
        problem = f"no {kind} of a block has the path that {role} is mapped to"
        remedy = f"use one of {', '.join(known[:_MOST_SHOWN])}"
        if taken:
            problem = f"{role} is one {kind} of a block, and several have it by path or name"
            remedy = "map it to a whole path, and the others to roles of their own"
        wanted = suffixes if isinstance(suffixes, str) else ", ".join(suffixes)
        raise ModelError("role_map", wanted, problem, remedy)


_MOST_SHOWN = 12
"""Paths that an error names."""


def _unsearched(
    model: nn.Module, blocks: Sequence[str], modules: Mapping[Site, tuple[str, ...]]
) -> dict[str, float]:
    """Return the share of the blocks' parameters in matrices without a role, by path in a block."""
    containers = ("norm", *_FOUND_FROM_OTHERS)
    searched = {
        path for (_, role), own in modules.items() if role not in containers for path in own
    }
    found: dict[str, int] = {}
    n_all = 0
    for block in dict.fromkeys(blocks):
        for path, module in model.get_submodule(block).named_modules():
            own = dict(module.named_parameters(recurse=False))
            n_all += sum(p.numel() for p in own.values())
            if f"{block}.{path}" in searched or isinstance(module, nn.Embedding):
                continue
            inside = re.sub(r"\.\d+(?=\.|$)", ".*", path)
            for name, parameter in own.items():
                if parameter.dim() > 1 and f"{block}.{path}.{name}" not in searched:
                    key = inside if name == "weight" else f"{inside}.{name}".lstrip(".")
                    found[key] = found.get(key, 0) + parameter.numel()
    return {key: found[key] / max(n_all, 1) for key in sorted(found, key=lambda key: -found[key])}


def _expert_shares(
    model: nn.Module, blocks: Sequence[str], shapes: Mapping[Site, Shape]
) -> dict[str, float]:
    """Return the share of the blocks' parameters of each role of experts."""
    parts = [model.get_submodule(block) for block in dict.fromkeys(blocks)]
    n_all = sum(p.numel() for part in parts for p in part.parameters())
    found: dict[str, int] = {}
    for (_, role), shape in shapes.items():
        if role in EXPERT_ROLES:
            found[role] = found.get(role, 0) + math.prod(shape)
    return {role: n / n_all for role, n in found.items()}


def is_chain(blocks: Sequence[str]) -> bool:
    """Return whether blocks are called one after the other, once each.

    False for an encoder and a decoder, and for a block that runs several times.
    """
    parents = {path.rpartition(".")[0] for path in blocks}
    return len(parents) == 1 and len(set(blocks)) == len(blocks)


def _self_attention(block: str, layer: int, modules: Mapping[Site, tuple[str, ...]]) -> str:
    """Return the path of the module that computes a block's self-attention, "" without one."""
    found = modules.get((layer, "attn.q")) or modules.get((layer, "attn.qkv"))
    if found is None or (layer, "attn.o") not in modules or (layer, "attn.kv_b") in modules:
        return ""  # The cache of a latent attention holds no keys of heads for a prefix to join.
    parent = found[0].rpartition(".")[0]
    return parent if parent.startswith(f"{block}.") else ""


def _topology(
    model: nn.Module, n_layers: int, sites: Mapping[Site, Shape], **rest: Any
) -> Topology:
    common: dict[str, Shape] = {}
    for role in ROLES:
        if all_ := [sites[layer, role] for layer in range(n_layers) if (layer, role) in sites]:
            common[role] = max(sorted(set(all_)), key=all_.count)
    overrides = {
        (layer, role): sites.get((layer, role))
        for layer in range(n_layers)
        for role in common
        if role != MODEL and sites.get((layer, role)) != common[role]
    }
    config = getattr(model, "config", None)
    n_heads = getattr(config, "num_attention_heads", 0)
    return Topology(
        n_layers=n_layers,
        shapes=common,
        overrides=overrides,
        n_heads=n_heads if isinstance(n_heads, int) else 0,
        **rest,
    )


def _shape(role: str, found: Sequence[nn.Module]) -> Shape:
    if role == "norm":
        sizes = [p.numel() for module in found for p in module.parameters(recurse=False)]
        # Usually one width; with several widths, only the count of parameters can be kept.
        return (sizes[0], len(sizes)) if len(set(sizes)) == 1 else (sum(sizes), 1)
    module = found[0]
    if isinstance(module, Conv1D):
        return (int(module.weight.shape[1]), int(module.weight.shape[0]))
    return (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _is_norm(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return "norm" in type(module).__name__.lower() and bool(own) and all(p.dim() == 1 for p in own)


def role_by_name(path: str) -> str | None:
    """Return the role of the linear module at a path inside a block, by its usual name."""
    *parents, leaf = path.lower().split(".")
    parent = ".".join(parents)
    if "att" in parent or "self" in parents:
        kind = "cross" if _CROSS.search(parent) else "attn"
        for part, leaves in _ATTENTION_LEAVES.items():
            if leaf in leaves:
                role = f"{kind}.{part}"
                return role if role in ROLES else None
        return None
    if leaf == "dense":
        if "intermediate" in parents:
            return "mlp.up"
        return "mlp.down" if parents and parents[-1] == "output" else None
    for role, leaves in _MLP_LEAVES.items():
        if leaf in leaves:
            return role
    return None


def _roles_of(block: nn.Module, role_map: RoleMap) -> dict[str, tuple[str, ...]]:
    """Return role -> paths inside the block; ambiguous linear roles are left out."""
    found: dict[str, list[str]] = {}
    norms = []
    for path, module in block.named_modules():
        if _is_linear(module):
            role = _mapped_role(path, role_map) or role_by_name(path)
            if role is not None and role != "norm":
                found.setdefault(role, []).append(path)
        elif _mapped_role(path, role_map) == "norm" if "norm" in role_map else _is_norm(module):
            norms.append(path)
    roles = {role: tuple(paths) for role, paths in found.items() if len(paths) == 1}
    if {"mlp.up", "mlp.down"} <= roles.keys() and "mlp.gate" not in roles:
        up, down = (block.get_submodule(roles[role][0]) for role in ("mlp.up", "mlp.down"))
        # ModernBERT's `Wi` feeds both halves of a gated unit, which only its shape shows.
        if _shape("", [up])[0] == 2 * _shape("", [down])[1]:
            roles["mlp.gate_up"] = roles.pop("mlp.up")
    if norms:
        roles["norm"] = tuple(norms)
    return roles


def _experts_of(block: nn.Module) -> dict[str, tuple[str, Shape]]:
    """Return role -> path of a parameter inside the block and its shape (out, in, experts)."""
    found: dict[str, list[tuple[str, Shape]]] = {}
    for path, module in block.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            role = _EXPERT_PARAMETERS.get(name)
            # peft takes one expert for a plain matrix.
            if role is None or parameter.dim() != 3 or parameter.shape[0] < 2:
                continue
            n, out, in_ = map(int, parameter.shape)
            if getattr(module, "is_transposed", False):
                out, in_ = in_, out
            found.setdefault(role, []).append((f"{path}.{name}", (out, in_, n)))
    return {role: places[0] for role, places in found.items() if len(places) == 1}


def _mapped_role(path: str, role_map: RoleMap) -> str | None:
    for role, suffixes in role_map.items():
        for suffix in (suffixes,) if isinstance(suffixes, str) else suffixes:
            if role != "blocks" and (path == suffix or path.endswith(f".{suffix}")):
                return role
    return None


def _block_lists(model: nn.Module, role_map: RoleMap, name: str) -> list[tuple[str, int]]:
    """Return (path, length) of the lists of blocks, the encoder's before the decoder's."""
    if "blocks" in role_map:
        given = role_map["blocks"]
        paths = (given,) if isinstance(given, str) else given
        return [(path, len(_module_list(model, path))) for path in paths]
    lists = [
        (path, module)
        for path, module in _module_lists(model)
        if all(_has_attention(element, role_map) for element in module)
    ]
    # The innermost: ALBERT's groups of layers contain lists of layers.
    inner = [
        (path, module)
        for path, module in lists
        if not any(other.startswith(f"{path}.") for other, _ in lists)
    ]
    if not inner:
        # A hybrid (Jamba): only some blocks have attention. The outermost list: T5's blocks contain
        # lists of attention and feed-forward.
        mixed = [
            (path, module)
            for path, module in _module_lists(model)
            if any(_has_attention(element, role_map) for element in module)
        ]
        inner = [
            (path, module)
            for path, module in mixed
            if not any(path.startswith(f"{other}.") for other, _ in mixed)
        ]
    if not inner:
        raise _no_blocks(model, name)
    if _is_encoder_decoder(model) and len(inner) > 1:
        inner.sort(key=lambda item: "decoder" in item[0].split("."))
        return [(path, len(module)) for path, module in inner[:2]]
    grandparents = {path.rpartition(".")[0].rpartition(".")[0] for path, _ in inner}
    if len(grandparents) > 1:
        # Towers side by side (CLIP): the larger one.
        inner = [max(inner, key=lambda item: sum(p.numel() for p in item[1].parameters()))]
    return [(path, len(module)) for path, module in inner]


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _module_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            yield path, module


def _module_list(model: nn.Module, path: str) -> nn.ModuleList:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if not isinstance(module, nn.ModuleList):
        lists = ", ".join(each for each, _ in _module_lists(model)) or "none"
        raise ModelError("role_map", path, "is not a module list", f"the model's lists: {lists}")
    return module


def _has_attention(block: nn.Module, role_map: RoleMap) -> bool:
    roles = _roles_of(block, role_map)
    return any(role.startswith("attn.") for role in roles) and len(roles) > 1


def _no_blocks(model: nn.Module, name: str) -> ModelError:
    linear = [path for path, module in model.named_modules() if _is_linear(module)]
    patterns = sorted({re.sub(r"\.\d+\.", ".*.", path) for path in linear})
    lists = [path for path, _ in _module_lists(model)]
    if not any(path.startswith(tuple(f"{each}." for each in lists)) for path in linear):
        return ModelError(
            "model",
            name,
            "is not a transformer: it has no list of blocks with attention",
            "use an encoder, decoder or encoder-decoder of transformers",
        )
    return ModelError(
        "model",
        name,
        "no attention was recognized in its blocks; its linear modules are "
        + ", ".join(patterns[:40]),
        "map them with role_map, e.g. {blocks: "
        + lists[0]
        + ", attn.q: <path inside a block>, mlp.down: <path inside a block>}",
    )
