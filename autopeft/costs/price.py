"""What a candidate costs, known before training."""

from __future__ import annotations

from dataclasses import dataclass

from autopeft.plan import Candidate


@dataclass(frozen=True)
class Price:
    """What a candidate costs, known before training.

    Attributes:
        trainable_params: Parameters that receive a gradient, a new head included.
        adapter_bytes: Size of the tensors that are saved, in bytes.
        train_flops: FLOPs of the whole proxy training, evaluation not counted.
        peak_memory_bytes: Estimated peak while training: weights, saved activations, gradients and
            optimizer state.
        inference_flops: FLOPs the unmerged adapters add to the forward pass of one batch.
    """

    trainable_params: int
    adapter_bytes: int
    train_flops: float
    peak_memory_bytes: int
    inference_flops: float = 0.0


@dataclass(frozen=True)
class PricedRow:
    """A candidate and its price; `kind` says why it is shown."""

    kind: str
    candidate: Candidate
    price: Price


@dataclass(frozen=True)
class PriceList:
    """What a space holds and costs.

    Attributes:
        lines: The space and the model in words.
        rows: A sample of candidates, cheapest first.
    """

    lines: tuple[str, ...]
    rows: tuple[PricedRow, ...]
