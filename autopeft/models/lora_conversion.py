"""Convert adapters to LoRA.

A mixed plan can be written as ONE LoRA, which any tool that serves LoRA can load: a merged adapter
is a change of a weight, and where that change has a low rank, a LoRA of that rank is the same
adapter. Zero rows bring all modules to one rank, and alpha equals it, so that every scaling is 1:
servers read one rank and one scaling for all modules, or divide alpha by each tensor's own rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from autopeft.errors import AdapterError
from autopeft.models.adapter_files import HEAD_FILE, TENSOR_FILE, write_tensors
from autopeft.models.attach import Attached
from autopeft.models.low_rank import Directions
from autopeft.models.merging import merged
from autopeft.models.method_hooks import ADAPTER_NAME
from autopeft.models.saving import PEFT_ROOT, TASK_TYPES, head_tensors, whole_modules
from autopeft.serving.joined import Joined, absent
from autopeft.serving.servers import MAX_RANK
from autopeft.utils.device import in_double

_TOLERANCE = 1e-5
"""Share of a change's norm that counts as rounding."""


@dataclass(frozen=True)
class Factors:
    """One module's LoRA with scaling 1, or one parameter's of several experts.

    Attributes:
        a: Shape (rank, in); of experts (experts * rank, in), as peft stores it.
        b: Shape (out, rank); of experts (out, rank * experts).
        error: Norm of what is missing from the change over the norm of the change; 0 if it is not
            more than rounding.
        n_experts: The number of experts of a parameter, 0 for a module.
    """

    a: torch.Tensor
    b: torch.Tensor
    error: float = 0.0
    n_experts: int = 0

    @property
    def rank(self) -> int:
        """The rank, of each expert."""
        return int(self.a.shape[0]) // max(1, self.n_experts)

    def padded(self, rank: int) -> Factors:
        """Return the same change at a higher rank; the new rows and columns are zero."""
        count, more = max(1, self.n_experts), rank - self.rank
        # peft keeps an expert's rows of A together, but the experts' columns of one rank in B.
        a = nn.functional.pad(self.a.reshape(count, self.rank, -1), (0, 0, 0, more))
        b = nn.functional.pad(self.b.reshape(-1, self.rank, count), (0, 0, 0, more))
        return replace(self, a=a.reshape(count * rank, -1), b=b.reshape(-1, rank * count))


@dataclass(frozen=True)
class Conversion:
    """A plan as one LoRA.

    Attributes:
        factors: Module path -> factors.
        lost: Module path -> why its adapter is not, or not fully, in the LoRA.
    """

    factors: Mapping[str, Factors]
    lost: Mapping[str, str] = field(default_factory=dict)


def convert(attached: Attached, *, max_rank: int = MAX_RANK) -> Conversion:
    """Return the LoRA that is closest to an attached candidate, of rank up to `max_rank`."""
    factors: dict[str, Factors] = {}
    lost: dict[str, str] = {}
    rest: set[str] = set()
    for part in attached.parts:
        method = part.group.method
        for path, layer in part.adapters():
            n_experts = layer.num_experts if path in part.group.parameters else 0
            if method.holds_lora_factors and part.group.ranks[path] <= max_rank:
                b, a = lora_factors(layer)
                factors[path] = Factors(a, b, n_experts=n_experts)
            elif n_experts:
                lost[path] = f"experts are not cut to rank {max_rank}"
            elif method.holds_lora_factors:
                found = Directions.of_product(*lora_factors(layer))
                no_more = _TOLERANCE * float(found.values.norm())
                factors[path] = _cut(found, max_rank, no_more)
                if factors[path].error:
                    lost[path] = _too_high(method.name, max_rank)
            elif not method.mergeable:
                lost[path] = f"{method.name} cannot be merged into a weight"
            elif not isinstance(attached.originals[path], nn.Linear | Conv1D):
                lost[path] = f"{method.name} does not change a linear module"
            else:
                rest.add(path)
    names = {path: part.group.method.name for part in attached.parts for path in part.layers}
    with merged(attached, frozenset(rest)) as before:
        for path in sorted(rest):
            module: Any = attached.model.get_submodule(path)
            change = module.weight.detach().double() - before[path]["weight"].double()
            if isinstance(module, Conv1D):
                change = change.T
            # Merging rounded every entry of the weight.
            rounding = torch.finfo(module.weight.dtype).eps * float(module.weight.detach().norm())
            factors[path] = factorize(change, max_rank=max_rank, rounding=rounding)
            bias = before[path].get("bias")
            if bias is not None and not torch.equal(bias, module.bias.detach()):
                lost[path] = f"{names[path]} changes the bias"
            elif factors[path].error:
                lost[path] = _too_high(names[path], max_rank)
    return Conversion(dict(sorted(factors.items())), lost)


def _too_high(method: str, max_rank: int) -> str:
    return f"{method} changes the weight by more than rank {max_rank} holds"


def factorize(change: torch.Tensor, *, max_rank: int, rounding: float = 0.0) -> Factors:
    """Return the smallest LoRA equal to a change up to rounding, or the best of `max_rank`.

    Args:
        change: Change of a weight, shape (out, in).
        max_rank: The highest rank allowed.
        rounding: Norm of the rounding error in the change.
    """
    here = in_double(change)
    no_more = max(_TOLERANCE * float(here.norm()), rounding)
    return _cut(Directions.of_change(here, max_rank=max_rank, no_more=no_more), max_rank, no_more)


def _cut(found: Directions, max_rank: int, no_more: float) -> Factors:
    """Return the smallest LoRA that misses no more than that, or the best of `max_rank`."""
    # left_out[r]: norm of all beyond the first r directions.
    squares = found.values.square().flip(0).cumsum(0).flip(0)
    left_out = (torch.cat([squares, squares.new_zeros(1)]) + found.left_out**2).sqrt()
    norm = float(left_out[0])
    enough = int((left_out <= max(no_more, found.left_out)).nonzero()[0, 0])
    rank = max(1, min(enough, max_rank))
    root = found.values[:rank].sqrt()
    return Factors(
        (root[:, None] * found.right[:rank]).float().contiguous(),
        (found.left[:, :rank] * root).float().contiguous(),
        float(left_out[rank]) / norm if enough > max_rank else 0.0,
    )


def export_lora(
    attached: Attached,
    folder: str | Path,
    *,
    max_rank: int = MAX_RANK,
    allow_lossy: bool = False,
    rank_for: Callable[[int], int] = lambda largest: largest,
    head_apart: bool = False,
    joined: Sequence[Joined] = (),
) -> Conversion:
    """Write a candidate as one standard LoRA folder; all modules have one rank, which is alpha.

    Args:
        attached: The candidate.
        folder: Folder to write; created if needed.
        max_rank: The highest rank of any module.
        allow_lossy: Write the closest LoRA where no LoRA is equal.
        rank_for: Returns the rank to write, given the largest rank of a module.
        head_apart: Write a new head to `head.safetensors`, by its names in the model, and not into
            the LoRA.
        joined: Modules that the reader computes as one; those that it needs and the plan leaves
            out get factors of zeros.

    Returns:
        The LoRA, and what was lost.

    Raises:
        AdapterError: if something would be lost and `allow_lossy` is False; nothing is written.
    """
    conversion = convert(attached, max_rank=max_rank)
    lost = conversion.lost
    if lost and not allow_lossy:
        where = "; ".join(
            f"{why} at {', '.join(path for path in lost if lost[path] == why)}"
            for why in dict.fromkeys(lost.values())
        )
        raise AdapterError(
            "format",
            "lora",
            f"these layers have no equal LoRA: {where}",
            "export as peft or merged, or accept the closest LoRA with --allow-lossy",
        )
    if not conversion.factors:
        raise AdapterError("format", "lora", "no layer can be a LoRA", "export as peft or merged")
    rank = rank_for(max(found.rank for found in conversion.factors.values()))
    factors = {path: found.padded(rank) for path, found in conversion.factors.items()}
    factors |= _of_zeros(attached.model, absent(factors, joined), rank)
    conversion = replace(conversion, factors=dict(sorted(factors.items())))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    backbone = attached.backbone
    head = head_tensors(attached)
    parameters = [path for path, found in conversion.factors.items() if found.n_experts]
    is_inside = bool(head) and not head_apart
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[path for path in conversion.factors if path not in parameters],
        target_parameters=parameters or None,
        fan_in_fan_out=bool(backbone.topology.transposed_roles),
        # For some task types peft guesses that there is a new head.
        task_type=TASK_TYPES.get(backbone.auto_class) if is_inside else None,
        modules_to_save=whole_modules(attached.model, backbone.head) if is_inside else None,
        base_model_name_or_path=backbone.base_model,
        revision=backbone.revision,
        inference_mode=True,
    )
    if backbone.auto_class == "AutoModelForCausalLM":
        config.task_type = "CAUSAL_LM"
    config.save_pretrained(str(folder))
    tensors = {f"{PEFT_ROOT}{name}": t for name, t in head.items() if is_inside}
    for path, found in conversion.factors.items():
        place = _wrapper_of(path, parameters, attached) if found.n_experts else path
        tensors[f"{PEFT_ROOT}{place}.lora_A.weight"] = found.a
        tensors[f"{PEFT_ROOT}{place}.lora_B.weight"] = found.b
    write_tensors(folder / TENSOR_FILE, tensors)
    if head and head_apart:
        write_tensors(folder / HEAD_FILE, head)
    return conversion


def _of_zeros(model: nn.Module, paths: Sequence[str], rank: int) -> dict[str, Factors]:
    """Return factors that change nothing, for those of the paths at which a module is linear."""
    modules = dict(model.named_modules())
    linear = {path: m for path in paths if isinstance(m := modules.get(path), nn.Linear)}
    return {
        path: Factors(torch.zeros(rank, m.in_features), torch.zeros(m.out_features, rank))
        for path, m in linear.items()
    }


def _wrapper_of(path: str, parameters: Sequence[str], attached: Attached) -> str:
    """Return where peft puts the adapter of a parameter: those of one module are nested."""
    module, _, name = path.rpartition(".")
    order = [n for n in attached.originals[module]._parameters if f"{module}.{n}" in parameters]
    return module + ".base_layer" * (len(order) - 1 - order.index(name))


def lora_factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return copies of a LoRA layer's scaled B (out, rank) and of A (rank, in)."""
    b = layer.lora_B[ADAPTER_NAME].weight.detach() * layer.scaling[ADAPTER_NAME]
    return b.clone(), layer.lora_A[ADAPTER_NAME].weight.detach().clone()
