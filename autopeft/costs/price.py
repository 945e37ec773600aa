"""What a candidate costs, known before training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autopeft.errors import SettingsError
from autopeft.plan import Candidate


@dataclass(frozen=True)
class Price:
    """What a candidate costs, known before training.

    Attributes:
        trainable_params: Parameters that receive a gradient, a new head included.
        adapter_bytes: Size of the saved tensors, in bytes.
        train_flops: FLOPs of the whole proxy training without evaluation.
        peak_memory_bytes: Estimated peak of what the allocator holds in training and scoring:
            weights, adapters and their optimizer's state, saved activations with the masks and
            rotary tables that blocks share, logits, and what a step holds for a moment.
        inference_flops: FLOPs that the unmerged adapters add to the forward pass of one training
            batch, with every sequence of its rows (a preference has two).
        others: Registered cost -> its value, for those that a search optimizes or limits.

    Example:
        >>> topology = autopeft.Topology(2, {"attn.q": (64, 64), "attn.v": (64, 64)})
        >>> space = autopeft.SearchSpace.from_source({"methods": ["lora", "ia3"]}, topology)

        >>> plan = autopeft.AdapterPlan([autopeft.LayerSpec(0, "attn.q", "lora", 8)])
        >>> candidate = autopeft.Candidate(plan, autopeft.TrainSettings(learning_rate=1e-3))
        >>> autopeft.PriceTable.from_topology(topology).price(candidate).trainable_params
        1024
    """

    trainable_params: int
    adapter_bytes: int
    train_flops: float
    peak_memory_bytes: int
    inference_flops: float = 0.0
    others: Mapping[str, float] = field(default_factory=dict)

    def value(self, name: str) -> float:
        """Return a cost by its name.

        Raises:
            SettingsError: if it is a registered one that the search neither optimizes nor limits.
        """
        if name in self.others:
            return self.others[name]
        if not hasattr(self, name):
            problem = "this search did not compute it"
            raise SettingsError("cost", name, problem, "name it in objectives or constraints")
        return float(getattr(self, name))


@dataclass(frozen=True)
class PricedRow:
    """A candidate, its price and why it is shown (`kind`)."""

    kind: str
    candidate: Candidate
    price: Price


@dataclass(frozen=True)
class Fit:
    """What fits in a memory in one way to save it; 0 where nothing does.

    Attributes:
        quantization: Of the frozen weights.
        gradient_checkpointing: Whether blocks are computed again in the backward pass.
        needed: Bytes that the settings themselves need.
        rank: The largest rank of a LoRA at every linear module, a power of two, as the next two.
        batch_size: The most rows of a step.
        length: The most tokens of a row.
    """

    quantization: str
    gradient_checkpointing: bool
    needed: int
    rank: int
    batch_size: int
    length: int


@dataclass(frozen=True)
class PriceList:
    """A sample of a space with prices, or what fits in a memory.

    Attributes:
        lines: Describe the space and the model.
        rows: A sample of candidates, cheapest first.
        fits: What fits in the memory that was asked for.
    """

    lines: tuple[str, ...]
    rows: tuple[PricedRow, ...] = ()
    fits: tuple[Fit, ...] = ()
