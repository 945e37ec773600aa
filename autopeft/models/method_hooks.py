"""What single methods need beyond peft's own injection: one table, method name -> hooks.

A method that peft handles alone has no entry. Everything else looks its hooks up with `hooks_for`
and never asks for a method by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import peft.tuners.boft.layer
import peft.tuners.shira.layer
import peft.tuners.supertuning.layer
import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tinylora.layer import TinyLoraLayer
from torch import nn

from autopeft.models.without_waits import Allocator, VbLoraLayer, WaveFtLayer

ADAPTER_NAME = "default"
"""peft's name for an adapter; groups never share a module, so all can have the same."""

_MIN_CACHED_RANK = 64
"""Singular triplets kept of each module, even where fewer were asked for."""

Layers = Mapping[str, nn.Module]
"""Module path -> peft's layer there."""


@dataclass
class SvdCache:
    """Singular value decompositions of the base model's weights, each computed once.

    A decomposition of a large module takes seconds, and many candidates start from one. It is the
    full, deterministic one, so that an adapter loaded elsewhere gets the same one again. It is
    computed on the host and kept there: singular vectors are unique up to their sign only, an
    accelerator may choose another one than peft will, and its memory is for trainings.
    """

    _known: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def leading(
        self, path: str, weight: torch.Tensor, rank: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the leading triplets of a weight (out, in): U (out, rank), S (rank,), V^T."""
        if path not in self._known or len(self._known[path][1]) < rank:
            here = weight.detach().float().cpu()
            left, values, right = torch.linalg.svd(here, full_matrices=False)
            kept = max(rank, min(_MIN_CACHED_RANK, len(values)))
            self._known[path] = (
                left[:, :kept].clone(),
                values[:kept].clone(),
                right[:kept].clone(),
            )
        left, values, right = (part.to(weight.device) for part in self._known[path])
        return left[:, :rank], values[:rank], right[:rank]


class TrainingHook(Protocol):
    """Acts while one group of adapters is trained."""

    def penalty(self) -> torch.Tensor:
        """Return what is added to the loss, a scalar."""

    def after_update(self, step: int) -> None:
        """Act after optimizer step `step`, counted from 1, while the gradients still exist."""


class MethodHooks:
    """The hooks of a method that needs none; subclasses override what they need."""

    def prepare_config(self, config: Any) -> None:
        """Change peft's configuration before injection."""

    def around_injection(self, holder: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which peft injects into the modules of `holder`."""
        return nullcontext()

    def after_injection(self, layers: Layers, svds: SvdCache) -> None:
        """Finish the initialization of the injected layers."""

    def after_load(self, layers: Layers) -> None:
        """Bring what was computed at injection in line with the tensors loaded since."""

    def training_hook(self, tuner: Any) -> TrainingHook | None:
        """Return what acts while the group around peft's tuner is trained."""
        return None


class _Pissa(MethodHooks):
    """PiSSA (arXiv 2404.02948): the leading triplets of W move from the weight into B A."""

    def prepare_config(self, config: Any) -> None:
        config.init_lora_weights = True  # `after_injection` does it from the cache.

    @torch.no_grad()
    def after_injection(self, layers: Layers, svds: SvdCache) -> None:
        for path, layer in layers.items():
            lora: Any = layer
            base, scaling = lora.get_base_layer(), lora.scaling[ADAPTER_NAME]
            a, b = lora.lora_A[ADAPTER_NAME].weight, lora.lora_B[ADAPTER_NAME].weight
            left, values, right = svds.leading(path, base.weight, a.shape[0])
            root = (values / scaling).sqrt()
            a.copy_(root[:, None] * right)
            b.copy_(left * root)
            # A new tensor: the old one's storage may belong to a view.
            base.weight.data = (base.weight.float() - scaling * b @ a).to(base.weight.dtype)


class _Psoft(MethodHooks):
    """PSOFT: frozen A = V^T and B = U S, as peft computes them, but from the cache.

    The layers also keep the sign of each direction. Singular vectors are unique only up to their
    sign, which another device or library may choose differently, and a rotation learned over some
    directions is meaningless over flipped ones.
    """

    def prepare_config(self, config: Any) -> None:
        config.psoft_svd, config.psoft_svd_lowrank_niter = "lowrank", 0

    def after_injection(self, layers: Layers, svds: SvdCache) -> None:
        for path, layer in layers.items():
            psoft: Any = layer
            weight = psoft.get_base_layer().weight
            left, values, right = svds.leading(path, weight, psoft.r[ADAPTER_NAME])
            a = right.contiguous().clone()
            b = left * (values / psoft.scaling[ADAPTER_NAME])
            psoft._set_psoft_ab_cache_buffers(ADAPTER_NAME, a, b)
            # Per row of A: the place of its largest entry, counted from 1, with its sign.
            place = a.abs().argmax(dim=1, keepdim=True)
            signs = (place + 1).squeeze(1).float() * a.gather(1, place).squeeze(1).sign()
            psoft.psoft_signs = BufferDict(persistent=True)
            psoft.psoft_signs[ADAPTER_NAME] = signs

    def after_load(self, layers: Layers) -> None:
        for layer in layers.values():
            psoft: Any = layer
            signs = psoft.psoft_signs[ADAPTER_NAME]
            a, b = psoft._get_psoft_ab_cache_buffers(ADAPTER_NAME)
            place = signs.abs().long() - 1
            flip = a.gather(1, place[:, None]).squeeze(1).sign() * signs.sign()
            psoft._set_psoft_ab_cache_buffers(ADAPTER_NAME, flip[:, None] * a, flip * b)


class _TinyLora(MethodHooks):
    """TinyLoRA: frozen A = sqrt(S) V^T and B = U sqrt(S), from the cache."""

    @contextmanager
    def around_injection(self, holder: nn.Module) -> Iterator[None]:
        def skip(layer: Any, adapter: str, rank: int, fan_in_fan_out: bool) -> None:
            weight = layer.get_base_layer().weight
            layer.tinylora_A[adapter] = weight.new_zeros(rank, layer.in_features)
            layer.tinylora_B[adapter] = weight.new_zeros(layer.out_features, rank)
            layer.r[adapter] = rank

        # peft decomposes every weight at each injection and has no switch for it (no upstream
        # issue known).
        original = TinyLoraLayer._init_svd
        TinyLoraLayer._init_svd = skip
        try:
            yield
        finally:
            TinyLoraLayer._init_svd = original

    @torch.no_grad()
    def after_injection(self, layers: Layers, svds: SvdCache) -> None:
        for path, layer in layers.items():
            tiny: Any = layer
            a, b = tiny.tinylora_A[ADAPTER_NAME], tiny.tinylora_B[ADAPTER_NAME]
            left, values, right = svds.leading(path, tiny.get_base_layer().weight, a.shape[0])
            a.copy_(values.sqrt()[:, None] * right)
            b.copy_(left * values.sqrt())


class _LoraFa(MethodHooks):
    """LoRA-FA (arXiv 2308.03303): A is frozen; B's gradient imitates that of full training."""

    def after_injection(self, layers: Layers, svds: SvdCache) -> None:
        for layer in layers.values():
            lora: Any = layer
            a, b = lora.lora_A[ADAPTER_NAME].weight, lora.lora_B[ADAPTER_NAME].weight
            a.requires_grad_(False)
            b.register_hook(_Projection(a, lora.scaling[ADAPTER_NAME]))


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


class _AdaLora(MethodHooks):
    """AdaLoRA: its ranks are allocated while it is trained."""

    def after_injection(self, layers: Layers, svds: SvdCache) -> None:
        for layer in layers.values():
            adalora: Any = layer
            # A constant that peft casts, and thereby makes trainable, over half precision (no
            # upstream issue known).
            adalora.ranknum[ADAPTER_NAME].requires_grad_(False)

    def training_hook(self, tuner: Any) -> TrainingHook:
        return RankAllocation(tuner)


class _WaveFt(MethodHooks):
    """WaveFT: indices and filters come to the device once, not in each step."""

    def after_injection(self, layers: Layers, svds: SvdCache) -> None:
        for layer in layers.values():
            WaveFtLayer.take_over(layer)


class _VbLora(MethodHooks):
    """VB-LoRA: no look at values in each step."""

    def after_injection(self, layers: Layers, svds: SvdCache) -> None:
        for layer in layers.values():
            layer.__class__ = VbLoraLayer


def _identity_like(matrix: torch.Tensor) -> torch.Tensor:
    return torch.eye(len(matrix), device=matrix.device, dtype=matrix.dtype)


class RankAllocation:
    """AdaLoRA's training (arXiv 2303.10512): drop unimportant triplets, keep the rest orthogonal.

    The tuner, an `AdaLoraModel`, holds the schedule in its configuration.
    """

    def __init__(self, tuner: Any) -> None:
        self._tuner = tuner
        tuner.rankallocator.__class__ = Allocator
        self._config = tuner.peft_config[ADAPTER_NAME]
        self._kept: dict[str, torch.Tensor] | None = None

    def penalty(self) -> torch.Tensor:
        """Return the mean distance of A A^T and B^T B from the identity, weighted.

        peft adds it in the forward pass of a whole `PeftModel`, which is never called here.
        """
        distances = []
        for name, parameter in self._tuner.model.named_parameters():
            if f"lora_A.{ADAPTER_NAME}" in name:
                product = parameter @ parameter.T  # (rank, rank)
            elif f"lora_B.{ADAPTER_NAME}" in name:
                product = parameter.T @ parameter  # (rank, rank)
            else:
                continue
            distances.append(torch.linalg.norm(product - _identity_like(product)))
        # A model may be spread over several devices.
        together = torch.stack([distance.to(distances[0].device) for distance in distances])
        return together.mean() * float(self._config.orth_reg_weight)

    def after_update(self, step: int) -> None:
        """Score all triplets and drop as many as the schedule says."""
        # When saving, peft would cut the dropped triplets out by names that a group's tensors do
        # not have, so the configuration holds them in here only.
        self._config.rank_pattern = self._kept
        try:
            self._tuner.update_and_allocate(step)
        finally:
            self._kept, self._config.rank_pattern = self._config.rank_pattern, None


class _GLora(MethodHooks):
    """GLoRA: peft takes `nn.Linear` itself only, none of its subclasses."""

    @contextmanager
    def around_injection(self, holder: nn.Module) -> Iterator[None]:
        # No upstream issue known. A quantized module stays what it is: its weight holds no floats.
        classes = {
            module: type(module)
            for module in holder.children()
            if isinstance(module, nn.Linear) and module.weight.is_floating_point()
        }
        for module in classes:
            module.__class__ = nn.Linear
        try:
            yield
        finally:
            for module, own in classes.items():
                module.__class__ = own


@contextmanager
def no_boft_extension() -> Iterator[None]:
    """Keep peft from compiling BOFT's CUDA extension, which takes minutes and may fail.

    The extension only speeds up the assembly of blocks (failures: huggingface/peft#2219). Without
    it peft allows one butterfly factor, and autopeft asks for one.
    """
    layer: Any = peft.tuners.boft.layer
    before = layer._FBD_CUDA
    layer._FBD_CUDA = False
    try:
        yield
    finally:
        layer._FBD_CUDA = before


class _Boft(MethodHooks):
    """BOFT: no CUDA extension."""

    def around_injection(self, holder: nn.Module) -> AbstractContextManager[None]:
        return no_boft_extension()


class _NoHookWarning(MethodHooks):
    """SHiRA and Super-Tuning: peft remembers every layer that ever ran, to warn of each once.

    Forgetting them here lets detached layers be freed (no upstream issue known).
    """

    def __init__(self, warn_once: Callable[..., Any]) -> None:
        self._warn_once: Any = warn_once

    def after_injection(self, layers: Layers, svds: SvdCache) -> None:
        self._warn_once.cache_clear()


class _Shira(_NoHookWarning):
    """SHiRA: its forward pass makes a sparse tensor."""

    def after_injection(self, layers: Layers, svds: SvdCache) -> None:
        super().after_injection(layers, svds)
        # torch's default, said explicitly: else torch warns, whatever the call itself says
        # (pytorch/pytorch#184610).
        torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]


_HOOKS: dict[str, MethodHooks] = {
    "pissa": _Pissa(),
    "psoft": _Psoft(),
    "tinylora": _TinyLora(),
    "tinylora_tied": _TinyLora(),
    "lora_fa": _LoraFa(),
    "adalora": _AdaLora(),
    "waveft": _WaveFt(),
    "vblora": _VbLora(),
    "glora": _GLora(),
    "boft": _Boft(),
    "shira": _Shira(peft.tuners.shira.layer._warn_once_about_module_hooks),
    "supertuning": _NoHookWarning(peft.tuners.supertuning.layer._warn_once_about_module_hooks),
}


def hooks_for(method: str) -> MethodHooks:
    """Return the hooks of the method of that name."""
    return _HOOKS.get(method) or MethodHooks()
