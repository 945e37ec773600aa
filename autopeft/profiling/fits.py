"""What fits in a memory: the largest rank, batch and length, each with the others as they are.

Nothing is loaded: a model on the `meta` device is priced on fake tensors, once for each length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autopeft import methods
from autopeft.costs import PriceTable, Topology, is_legal
from autopeft.costs.memory import usable_bytes
from autopeft.costs.price import Fit
from autopeft.models.backbone import Backbone
from autopeft.models.quantization import NONE, quantized_modules, quantized_table
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.profiling.fake_tensors import AS_CONFIGURED, InputShape
from autopeft.profiling.measure import price_table
from autopeft.utils.formatting import human_bytes

RANK = 16
"""The rank where batch and length vary."""

_POWERS = tuple(2**power for power in range(18))
_SHORTEST = 32
_QUANTIZED = "bnb-4bit"


@dataclass(frozen=True)
class Load:
    """How much a training step holds at once.

    Attributes:
        batch_size: Rows of a step.
        length: Tokens of its rows.
        longest: The most tokens that the model's positions allow; None: no limit.
        target_share: Share of a row's tokens whose logits are computed; 0: a head of its own.
        sequences_per_row: Sequences in a row: two for a preference.
        inputs: Shape of a row's inputs beside its length.
    """

    batch_size: int
    length: int
    longest: int | None = None
    target_share: float = 0.0
    sequences_per_row: int = 1
    inputs: InputShape = AS_CONFIGURED


def lora_everywhere(topology: Topology, rank: int) -> AdapterPlan:
    """Return LoRA of a rank at every linear module of the blocks where it can be so large."""
    specs = (
        LayerSpec(layer, role, "lora", rank)
        for layer in range(topology.n_layers)
        for role in topology.roles(layer)
        if role in methods.get("lora").roles
    )
    return AdapterPlan(spec for spec in specs if is_legal(topology, spec))


class Fitting:
    """Prices a model's LoRA in any rank, batch, length and way to save memory.

    Args:
        meta: The model, made by `build_meta` or `build_from_config`, not quantized.
        load: What a step holds.
        device: Device that will train.
        dtype: Type of its frozen weights.
    """

    def __init__(self, meta: Backbone, load: Load, *, device: str, dtype: str) -> None:
        self.meta = meta
        self.load = load
        self._device, self._dtype = device, dtype
        self._tables: dict[int, PriceTable] = {}

    def _table(self, length: int) -> PriceTable:
        """Return the prices of one row of a length."""
        load = self.load
        if length not in self._tables:
            table = price_table(
                self.meta,
                batch_size=load.sequences_per_row,
                mean_length=length,
                longest_length=length,
                device=self._device,
                inputs=load.inputs,
                dtype=self._dtype,
            )
            self._tables[length] = replace(table, batch_size=1)
        return self._tables[length]

    def peak_bytes(
        self,
        *,
        quantization: str = NONE,
        gradient_checkpointing: bool = False,
        plan: AdapterPlan | None = None,
        rank: int = RANK,
        batch_size: int | None = None,
        length: int | None = None,
    ) -> float:
        """Return what the allocator holds at once, for a plan or for LoRA at every linear module.

        It is inf where no module takes the rank.
        """
        load, meta = self.load, self.meta
        length = length or load.length
        table = self._table(length).as_trained(
            has_activation_cache=False,
            most_logit_tokens=load.target_share * length * load.sequences_per_row,
            scoring_tokens=length,  # A scoring halves its batches until they fit.
            has_checkpointing=gradient_checkpointing,
        )
        if quantization != NONE:
            modules = quantized_modules(meta.model, meta.layout.blocks, quantization)
            table = quantized_table(table, modules, quantization)
        if plan is None:
            plan = lora_everywhere(table.topology, rank)
        if not plan.specs:
            return float("inf")
        train = TrainSettings(1e-4, batch_size=batch_size or load.batch_size)
        return table.price(Candidate(plan, train)).peak_memory_bytes

    def ways(self) -> list[tuple[str, bool]]:
        """Return pairs of quantization and gradient checkpointing, the cheapest in time first."""
        found = [(NONE, False), (NONE, True)]
        if self.meta.topology.transposed_roles:
            return found
        return [*found, (_QUANTIZED, False), (_QUANTIZED, True)]

    def fits(self, memory: float) -> tuple[Fit, ...]:
        """Return the largest rank, batch and length that fit in a device's memory, each way."""
        usable = usable_bytes(memory)
        longest = self.load.longest or _POWERS[-1]
        lengths = [n for n in _POWERS if _SHORTEST <= n <= longest]
        found = []
        for quantization, checkpointing in self.ways():

            def peak(**changes: Any) -> float:
                return self.peak_bytes(
                    quantization=quantization,  # noqa: B023
                    gradient_checkpointing=checkpointing,  # noqa: B023
                    **changes,
                )

            found.append(
                Fit(
                    quantization,
                    checkpointing,
                    needed=round(peak()),
                    rank=_largest(_POWERS[:11], lambda n: peak(rank=n) <= usable),
                    batch_size=_largest(_POWERS, lambda n: peak(batch_size=n) <= usable),
                    length=_largest(lengths, lambda n: peak(length=n) <= usable),
                )
            )
        return tuple(found)

    def remedy(self, usable: float, plan: AdapterPlan) -> str:
        """Return in words what would let a plan fit, the least change first.

        A way to save memory comes first, then a smaller batch and a shorter row beside it.

        Args:
            usable: Bytes that there are for it.
            plan: The plan; LoRA over quantized weights is possible.
        """
        changes: list[dict[str, Any]] = [{}]
        changes += [{"batch_size": n} for n in self._halved("batch_size")]
        changes += [{"batch_size": 1, "length": n} for n in self._halved("length")]
        for change in changes:
            for quantization, checkpointing in self.ways():
                needed = self.peak_bytes(
                    plan=plan,
                    quantization=quantization,
                    gradient_checkpointing=checkpointing,
                    **change,
                )
                if needed <= usable:
                    parts = [f"quantization={quantization}"] if quantization != NONE else []
                    parts += ["gradient_checkpointing=true"] if checkpointing else []
                    names = {"length": "max_length"}
                    parts += [f"{names.get(name, name)}={n}" for name, n in change.items()]
                    return f"use {', '.join(parts)}, which needs {human_bytes(needed)}"
        return "it fits in no way that autopeft knows: use a larger device or a smaller model"

    def _halved(self, name: str) -> list[int]:
        """Return the smaller powers of two, largest first."""
        least = _SHORTEST if name == "length" else 1
        return [n for n in _POWERS[::-1] if least <= n < getattr(self.load, name)]


def _largest(values: Sequence[int], fits: Callable[[int], bool]) -> int:
    """Return the largest value that fits, 0 if none does; a smaller one fits too."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if fits(values[middle]):
            low = middle + 1
        else:
            high = middle
    return values[low - 1] if low else 0
