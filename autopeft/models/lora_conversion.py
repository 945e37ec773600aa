"""Writes a mixed plan as ONE LoRA, which any tool that serves LoRA can load.

Whatever a method does to a linear module, once folded in it is a change of the weight; where that
change has a low rank, a LoRA of that rank is the same adapter. Ranks differ from site to site, and
alpha equals rank everywhere, so that every scaling is 1: tools that read one scaling from the
configuration (vLLM) agree with peft, which reads one for each module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from autopeft.errors import AdapterError
from autopeft.models.adapter_files import TENSOR_FILE, write_tensors
from autopeft.models.attach import Attached
from autopeft.models.merging import merged
from autopeft.models.method_hooks import ADAPTER_NAME
from autopeft.models.saving import PEFT_PREFIX, TASK_TYPES, head_tensors, whole_modules

MAX_RANK = 128
"""Ranks above this are not worth a LoRA, and few servers take them."""

_TOLERANCE = 1e-5
"""Share of a change's norm that may be left out and still be called rounding."""


@dataclass(frozen=True)
class Factors:
    """One module's LoRA with scaling 1.

    Attributes:
        a: Shape (rank, in).
        b: Shape (out, rank).
        error: Norm of what was left out of the change, over the change's norm; 0 if no more than
            rounding was.
    """

    a: torch.Tensor
    b: torch.Tensor
    error: float = 0.0

    @property
    def rank(self) -> int:
        """Its rank."""
        return int(self.a.shape[0])


@dataclass(frozen=True)
class Conversion:
    """A plan as one LoRA.

    Attributes:
        factors: Module path -> factors.
        lost: Module path -> why what it holds is not, or not wholly, in the LoRA.
    """

    factors: Mapping[str, Factors]
    lost: Mapping[str, str] = field(default_factory=dict)

    def lost_by_reason(self) -> dict[str, list[str]]:
        """Why -> module paths."""
        reasons: dict[str, list[str]] = {}
        for path, why in self.lost.items():
            reasons.setdefault(why, []).append(path)
        return reasons


def convert(attached: Attached, *, max_rank: int = MAX_RANK) -> Conversion:
    """The LoRA nearest to an attached candidate.

    Args:
        attached: What to convert; left as it is.
        max_rank: No module gets a higher rank.
    """
    factors: dict[str, Factors] = {}
    lost: dict[str, str] = {}
    rest: set[str] = set()
    for part in attached.parts:
        method = part.group.method
        for path, layer in part.layers.items():
            if method.holds_lora_factors and part.group.ranks[path] <= max_rank:
                b, a = lora_factors(layer)
                factors[path] = Factors(a, b)
            elif not method.mergeable:
                lost[path] = f"{method.name} cannot be folded into a weight"
            elif not isinstance(attached.original(path), nn.Linear | Conv1D):
                lost[path] = f"{method.name} changes no linear module"
            else:
                rest.add(path)
    names = {path: part.group.method.name for part in attached.parts for path in part.layers}
    with merged(attached, frozenset(rest)) as before:
        for path in sorted(rest):
            module: Any = attached.model.get_submodule(path)
            change = module.weight.detach().double() - before[path]["weight"].double()
            if isinstance(module, Conv1D):
                change = change.T
            # Folding in rounded every entry of the weight.
            rounding = torch.finfo(module.weight.dtype).eps * float(module.weight.detach().norm())
            found = factors[path] = factorize(change, max_rank=max_rank, rounding=rounding)
            bias = before[path].get("bias")
            if bias is not None and not torch.equal(bias, module.bias.detach()):
                lost[path] = f"{names[path]} changes the bias"
            elif found.error:
                lost[path] = f"{names[path]} changes the weight by more than rank {max_rank} holds"
    return Conversion(dict(sorted(factors.items())), lost)


def factorize(change: torch.Tensor, *, max_rank: int, rounding: float = 0.0) -> Factors:
    """The smallest LoRA that is the change up to rounding, or the best one of `max_rank`.

    Args:
        change: Of a weight, shape (out, in).
        max_rank: The most it may be.
        rounding: Norm of the change's own error.
    """
    left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
    # left_out[r]: squared norm of all beyond the first r directions.
    squares = values.square().flip(0).cumsum(0).flip(0)
    left_out = torch.cat([squares, squares.new_zeros(1)]).sqrt()
    norm = float(left_out[0])
    no_more = max(_TOLERANCE * norm, rounding)
    enough = int((left_out <= no_more).nonzero()[0, 0])
    rank = max(1, min(enough, max_rank))
    root = values[:rank].sqrt()
    return Factors(
        (root[:, None] * right[:rank]).float().contiguous(),
        (left[:, :rank] * root).float().contiguous(),
        float(left_out[rank]) / norm if enough > max_rank else 0.0,
    )


def export_lora(
    attached: Attached,
    folder: str | Path,
    *,
    max_rank: int = MAX_RANK,
    allow_lossy: bool = False,
) -> Conversion:
    """Writes a candidate as one standard LoRA folder.

    Args:
        attached: What to write.
        folder: Where to; made if need be.
        max_rank: No module gets a higher rank.
        allow_lossy: Write the nearest LoRA where there is no equal one.

    Returns:
        What was written, and what was lost.

    Raises:
        AdapterError: if something would be lost and may not be; names the layers, nothing written.
    """
    conversion = convert(attached, max_rank=max_rank)
    if conversion.lost and not allow_lossy:
        where = "; ".join(
            f"{why} at {', '.join(paths)}" for why, paths in conversion.lost_by_reason().items()
        )
        raise AdapterError(
            "format",
            "lora",
            f"these layers have no equal LoRA: {where}",
            "export as peft or merged, or take the nearest LoRA with --allow-lossy",
        )
    if not conversion.factors:
        raise AdapterError("format", "lora", "no layer can be a LoRA", "export as peft or merged")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    backbone = attached.backbone
    ranks = {path: found.rank for path, found in conversion.factors.items()}
    counts = sorted(ranks.values())
    commonest = max(sorted(set(counts)), key=counts.count)
    others = {path: rank for path, rank in ranks.items() if rank != commonest}
    head = head_tensors(attached)
    config = LoraConfig(
        r=commonest,
        lora_alpha=commonest,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=list(ranks),
        fan_in_fan_out=bool(backbone.topology.transposed_roles),
        task_type=TASK_TYPES.get(backbone.auto_class) if head else None,
        modules_to_save=whole_modules(attached.model, backbone.head) if head else None,
        base_model_name_or_path=backbone.base_model,
        revision=backbone.revision,
        inference_mode=True,
    )
    if backbone.auto_class == "AutoModelForCausalLM":
        config.task_type = "CAUSAL_LM"
    config.save_pretrained(str(folder))
    tensors = {f"{PEFT_PREFIX}model.{name}": tensor for name, tensor in head.items()}
    for path, found in conversion.factors.items():
        tensors[f"{PEFT_PREFIX}model.{path}.lora_A.weight"] = found.a
        tensors[f"{PEFT_PREFIX}model.{path}.lora_B.weight"] = found.b
    write_tensors(folder / TENSOR_FILE, tensors)
    return conversion


class TrainedLora:
    """What was trained, copied, so that it can be cut to any rank after it was detached.

    Args:
        attached: A plan of ordinary LoRA layers only.
    """

    def __init__(self, attached: Attached) -> None:
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for part in attached.parts:
            for path, layer in part.layers.items():
                self._factors[path] = lora_factors(layer)
        self._head = [p.detach().clone() for p in attached.head_parameters()]

    @torch.no_grad()
    def cut_into(self, attached: Attached) -> None:
        """Fills an attached candidate of the same sites and lower ranks with the nearest LoRA."""
        for part in attached.parts:
            for path, layer in part.layers.items():
                _fill(layer, *self._factors[path])
        for parameter, trained in zip(attached.head_parameters(), self._head, strict=True):
            parameter.copy_(trained)


def lora_factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of a LoRA layer's B, (out, rank), with the scaling in it, and A, (rank, in)."""
    b = layer.lora_B[ADAPTER_NAME].weight.detach() * layer.scaling[ADAPTER_NAME]
    return b.clone(), layer.lora_A[ADAPTER_NAME].weight.detach().clone()


def _fill(layer: Any, b: torch.Tensor, a: torch.Tensor) -> None:
    own_a, own_b = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
    rank = own_a.shape[0]
    # B A = Q_b (R_b R_a^T) Q_a^T: the decomposition of a (rank, rank) matrix is all it takes.
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    left, values, right = torch.linalg.svd(r_b @ r_a.T)
    root = values[:rank].sqrt()
    own_b.copy_((q_b @ left[:, :rank]) * root / layer.scaling[ADAPTER_NAME])
    own_a.copy_((root[:, None] * right[:rank]) @ q_a.T)
