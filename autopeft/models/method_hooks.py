"""What some methods need between peft's injection and the first training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tinylora.layer import TinyLoraLayer
from torch import nn

ADAPTER_NAME = "default"
"""peft's name for an adapter; groups never share a module, so all can have the same."""

_MAX_RANK = 64
"""Singular triplets kept of each module; larger ranks are decomposed anew."""


@dataclass
class PrincipalParts:
    """Singular value decompositions of the base model's modules, each computed once.

    A full decomposition takes seconds on large modules; candidates that start from it come often.
    It is the full one, so that it can be computed again when an adapter is loaded elsewhere.
    """

    _known: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def of(
        self, path: str, weight: torch.Tensor, rank: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The leading part of a weight (out, in): U (out, rank), S (rank,), V^T (rank, in)."""
        if path not in self._known or len(self._known[path][1]) < rank:
            left, values, right = torch.linalg.svd(weight.detach().float(), full_matrices=False)
            kept = max(rank, min(_MAX_RANK, len(values)))
            self._known[path] = (
                left[:, :kept].clone(),
                values[:kept].clone(),
                right[:kept].clone(),
            )
        left, values, right = self._known[path]
        return left[:, :rank], values[:rank], right[:rank]


@contextmanager
def plain_classes(holder: nn.Module) -> Iterator[None]:
    """Lets a holder's modules pass for `nn.Linear` itself, the only class that peft's GLoRA takes.

    Only those that are one in all but name: a quantized weight is no matrix of floats.
    """
    others = {
        module: type(module)
        for module in holder.children()
        if isinstance(module, nn.Linear) and module.weight.is_floating_point()
    }
    for module in others:
        module.__class__ = nn.Linear
    try:
        yield
    finally:
        for module, kind in others.items():
            module.__class__ = kind


@contextmanager
def no_decomposition() -> Iterator[None]:
    """While it is open, TinyLoRA's injection leaves its factors to `finish_start`."""

    def leave(layer: Any, adapter: str, rank: int, fan_in_fan_out: bool) -> None:
        weight = layer.get_base_layer().weight
        layer.tinylora_A[adapter] = weight.new_zeros(rank, layer.in_features)
        layer.tinylora_B[adapter] = weight.new_zeros(layer.out_features, rank)
        layer.r[adapter] = rank

    own = TinyLoraLayer._init_svd
    TinyLoraLayer._init_svd = leave
    try:
        yield
    finally:
        TinyLoraLayer._init_svd = own


def without_slow_start(config: Any) -> None:
    """Lets peft skip a decomposition that `finish_start` does from the cache."""
    if getattr(config, "init_lora_weights", None) == "pissa":
        config.init_lora_weights = True
    if getattr(config, "psoft_svd", None) == "full":
        config.psoft_svd, config.psoft_svd_lowrank_niter = "lowrank", 0


def finish_start(method: str, layers: Mapping[str, nn.Module], parts: PrincipalParts) -> None:
    """Does for a method's layers what peft's injection leaves to others.

    Args:
        method: Its name.
        layers: Module path -> peft's layer there.
        parts: Decompositions of the base model's weights.
    """
    if method == "pissa":
        start_from_principal_parts(layers, parts)
    elif method == "psoft":
        rotate_principal_parts(layers, parts)
    elif method == "lora_fa":
        freeze_a(layers)
    elif method == "adalora":
        freeze_rank_numbers(layers)
    elif method in ("tinylora", "tinylora_tied"):
        hold_principal_parts(layers, parts)


@torch.no_grad()
def start_from_principal_parts(layers: Mapping[str, nn.Module], parts: PrincipalParts) -> None:
    """PiSSA's start (arXiv 2404.02948): the leading part of W moves from the weight into B A."""
    for path, layer in layers.items():
        lora: Any = layer
        base, scaling = lora.get_base_layer(), lora.scaling[ADAPTER_NAME]
        a, b = lora.lora_A[ADAPTER_NAME].weight, lora.lora_B[ADAPTER_NAME].weight
        left, values, right = parts.of(path, base.weight, a.shape[0])
        root = (values / scaling).sqrt()
        a.copy_(root[:, None] * right)
        b.copy_(left * root)
        # A new tensor: the old one's storage may be a view's.
        base.weight.data = (base.weight.float() - scaling * b @ a).to(base.weight.dtype)


def rotate_principal_parts(layers: Mapping[str, nn.Module], parts: PrincipalParts) -> None:
    """PSOFT's frozen A = V^T and B = U S, from which peft's own start differs in nothing."""
    for path, layer in layers.items():
        psoft: Any = layer
        weight = psoft.get_base_layer().weight
        left, values, right = parts.of(path, weight, psoft.r[ADAPTER_NAME])
        a = right.contiguous().clone()
        b = left * (values / psoft.scaling[ADAPTER_NAME])
        psoft._set_psoft_ab_cache_buffers(ADAPTER_NAME, a, b)
        psoft.psoft_signs = BufferDict(persistent=True)
        psoft.psoft_signs[ADAPTER_NAME] = _signs(a)


def _signs(a: torch.Tensor) -> torch.Tensor:
    """For each row of (rank, in), the place of its largest entry, from 1, with that one's sign."""
    place = a.abs().argmax(dim=1, keepdim=True)
    return (place + 1).squeeze(1).float() * a.gather(1, place).squeeze(1).sign()


def finish_load(method: str, layers: Mapping[str, nn.Module]) -> None:
    """Brings what was computed at the start in line with what was loaded since.

    Singular vectors are unique but for their sign, which another device or library may choose
    otherwise; PSOFT's rotation is meaningless over directions that point the other way.
    """
    if method != "psoft":
        return
    for layer in layers.values():
        psoft: Any = layer
        signs = psoft.psoft_signs[ADAPTER_NAME]
        a, b = psoft._get_psoft_ab_cache_buffers(ADAPTER_NAME)
        place = signs.abs().long() - 1
        turn = a.gather(1, place[:, None]).squeeze(1).sign() * signs.sign()
        psoft._set_psoft_ab_cache_buffers(ADAPTER_NAME, turn[:, None] * a, turn * b)


@torch.no_grad()
def hold_principal_parts(layers: Mapping[str, nn.Module], parts: PrincipalParts) -> None:
    """TinyLoRA's frozen A = sqrt(S) V^T and B = U sqrt(S)."""
    for path, layer in layers.items():
        tiny: Any = layer
        a, b = tiny.tinylora_A[ADAPTER_NAME], tiny.tinylora_B[ADAPTER_NAME]
        left, values, right = parts.of(path, tiny.get_base_layer().weight, a.shape[0])
        a.copy_(values.sqrt()[:, None] * right)
        b.copy_(left * values.sqrt())


def freeze_a(layers: Mapping[str, nn.Module]) -> None:
    """LoRA-FA (arXiv 2308.03303): A stays; B's gradient is the one nearest to full training's."""
    for layer in layers.values():
        lora: Any = layer
        a, b = lora.lora_A[ADAPTER_NAME].weight, lora.lora_B[ADAPTER_NAME].weight
        a.requires_grad_(False)
        b.register_hook(_Projection(a, lora.scaling[ADAPTER_NAME]))


def freeze_rank_numbers(layers: Mapping[str, nn.Module]) -> None:
    """AdaLoRA divides by the rank; over half precision, peft makes a trained parameter of that."""
    for layer in layers.values():
        adalora: Any = layer
        adalora.ranknum[ADAPTER_NAME].requires_grad_(False)


class _Projection:
    """g -> g (A A^T)^-1 / scaling^2, of shape (out, rank)."""

    def __init__(self, a: torch.Tensor, scaling: float) -> None:
        self._a, self._scaling = a, scaling
        self._refresh()

    def _refresh(self) -> None:
        a = self._a.detach().double()
        self._inverse = torch.linalg.pinv(a @ a.T).to(self._a.dtype) / self._scaling**2
        self._version = self._a._version

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        if self._version != self._a._version:
            self._refresh()  # Another A was loaded.
        projected: torch.Tensor = gradient @ self._inverse.to(gradient)
        return projected
