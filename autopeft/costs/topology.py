"""The shapes of a model: where adapters can go, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autopeft.methods.base import Shape as Shape
from autopeft.plan import MODEL


@dataclass(frozen=True)
class Topology:
    """Where adapters can go in one model: plain shapes, read from a model or written by hand.

    Attributes:
        n_layers: Number of blocks; in an encoder-decoder the encoder's come first.
        shapes: Role -> (out, in) of the linear module with that role. "experts.": (out, in,
            experts). "norm": (width, number of
            vectors in the block's normalizations), so that the product counts their parameters.
            "block": (width, width). "attn": (heads, total width of the heads), if self-attentions
            can have a prefix. "model": (most virtual tokens, width of the input embeddings), if the
            model can have a prompt; it counts as a site of layer 0.
        overrides: (layer, role) -> shape, where a block differs from `shapes`; None where the block
            lacks the role.
        n_heads: Attention heads; 0 where unknown.
        head_params: Parameters trained besides the adapters (a new classification head).
        n_encoder_layers: Number of the encoder's blocks in an encoder-decoder; else 0.
        transposed_roles: Roles whose modules store their weight as (in, out), as GPT-2's Conv1D
            does.
        is_quantized: Whether weights are stored in 4 or 8 bits, which not all methods support.

    Example:
        >>> topology = autopeft.Topology(2, {"attn.q": (64, 64), "mlp.down": (64, 256)})
        >>> topology.shape(1, "mlp.down")
        (64, 256)
    """

    n_layers: int
    shapes: Mapping[str, Shape]
    overrides: Mapping[tuple[int, str], Shape | None] = field(default_factory=dict)
    n_heads: int = 0
    head_params: int = 0
    n_encoder_layers: int = 0
    transposed_roles: tuple[str, ...] = ()
    is_quantized: bool = False

    def shape(self, layer: int, role: str) -> Shape | None:
        """Return (out, in) at a site, or None if the model has no such site."""
        if not 0 <= layer < self.n_layers or (role == MODEL and layer):
            return None
        if (layer, role) in self.overrides:
            return self.overrides[layer, role]
        return self.shapes.get(role)

    def roles(self, layer: int) -> tuple[str, ...]:
        """Return the roles of one block, in no particular order."""
        extra = [role for at, role in self.overrides if at == layer and role not in self.shapes]
        return tuple(r for r in (*self.shapes, *extra) if self.shape(layer, r) is not None)
