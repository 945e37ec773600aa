"""Bottleneck adapters: a small two-layer network after a module or beside it.

Sources: after attention and feed-forward, Houlsby et al. (arXiv 1902.00751); after the feed-forward
only, Pfeiffer et al. (arXiv 2005.00247); in parallel, He et al. (arXiv 2110.04366), who find it
better than in series. peft has no bottleneck adapters; `autopeft.models.tuners` implements them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autopeft.methods.base import AdapterFlops, AdapterMemory, Method, Shape, low_rank_flops
from autopeft.plan import TrainSettings

_RANKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Bottleneck(Method):
    """h = W x -> h + s U relu(D h), D (rank, out) random and U (out, rank) zero at the start.

    At attn.o and mlp.down, h is what a sub-layer adds to the residual stream.
    """

    parallel: bool = False

    def _source(self, shape: Shape) -> int:
        """Width of what D reads."""
        return shape[1] if self.parallel else shape[0]

    def n_params(self, rank: int, shape: Shape, role: str = "") -> int:
        """D and U with their biases."""
        return rank * (self._source(shape) + shape[0]) + rank + shape[0]

    def flops(self, rank: int, shape: Shape, role: str = "") -> AdapterFlops:
        """Two thin products forward; backward a gradient each for U, the inner values and D."""
        return low_rank_flops(rank, (shape[0], self._source(shape)))

    def memory(self, rank: int, shape: Shape, role: str = "") -> AdapterMemory:
        """What D reads, for D's gradient, and the inner values; with dropout, a copy and a mask."""
        return AdapterMemory(
            per_token=rank + (0 if self.parallel else shape[0]),
            dropout_per_token=2.0 * rank,
            keeps_input=self.parallel,
        )

    def max_rank(self, shape: Shape) -> int:
        """The smaller of D's input and U's output."""
        return min(self._source(shape), shape[0])

    def peft_config(self, rank: int, train: TrainSettings) -> dict[str, Any]:
        """Arguments of `autopeft.models.tuners.BottleneckConfig`."""
        return {
            "peft_type": "BOTTLENECK",
            "r": rank,
            "parallel": self.parallel,
            "scaling": train.alpha_ratio,
            "bottleneck_dropout": train.dropout,
        }


METHODS: tuple[Method, ...] = (
    Bottleneck(
        name="bottleneck",
        default_ranks=_RANKS,
        roles=("attn.o", "cross.o", "mlp.down"),
        learning_rate=(7e-4, 2.5e-2),
        mergeable=False,
        rank_patterns=(("r", "rank_pattern"),),
    ),
    Bottleneck(
        name="parallel_bottleneck",
        default_ranks=_RANKS,
        learning_rate=(4e-4, 1.5e-2),
        mergeable=False,
        rank_patterns=(("r", "rank_pattern"),),
        parallel=True,
    ),
)
