"""What a candidate costs before training: plain numbers, no torch.

`autopeft.models.price` measures a `PriceTable` once per model; `search` prices with it. A table can
also be made from shapes alone, so that a search can be driven where there is no model at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

Shape = tuple[int, int]


@dataclass(frozen=True)
class Topology:
    """Where adapters can go in one model: plain shapes, from a model or written by hand.

    Attributes:
        n_layers: Number of blocks; an encoder-decoder counts its encoder's blocks first.
        shapes: Role -> (out, in) of the linear module with that role. For "norm": (width, number of
            vectors in the block's normalisations), so that the product counts their parameters.
            For "block": (width, width).
        overrides: (layer, role) -> shape where a block differs from `shapes`; None where that block
            lacks the role.
        n_heads: Attention heads; 0 where unknown.
        head_params: Parameters trained besides the adapters (a new classification head).
    """

    n_layers: int
    shapes: Mapping[str, Shape]
    overrides: Mapping[tuple[int, str], Shape | None] = field(default_factory=dict)
    n_heads: int = 0
    head_params: int = 0

    def shape(self, layer: int, role: str) -> Shape | None:
        """(out, in) at a site, or None where the model has no such site."""
        if not 0 <= layer < self.n_layers:
            return None
        if (layer, role) in self.overrides:
            return self.overrides[layer, role]
        return self.shapes.get(role)


@dataclass(frozen=True)
class Price:
    """What a candidate costs, known before training.

    Attributes:
        trainable_params: Parameters that receive a gradient, a new head included.
        adapter_bytes: Size of what is saved, in bytes.
        train_flops: FLOPs of the whole proxy training, evaluation not counted.
        peak_memory_bytes: Estimated peak while training: weights, saved activations, gradients and
            optimiser state.
        inference_flops: FLOPs the unmerged adapters add to the forward pass of one batch.
    """

    trainable_params: int
    adapter_bytes: int
    train_flops: float
    peak_memory_bytes: int
    inference_flops: float = 0.0

    def to_json(self) -> dict[str, float]:
        """A plain dict."""
        return asdict(self)
