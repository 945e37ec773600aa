"""Cut a trained LoRA to fewer parameters: one cut through the singular values of all sites.

The update of a site is s B A = sum_j v_j l_j r_j^T with v_1 >= v_2 >= ... Leaving direction j out
changes the weights by v_j in the Frobenius norm and saves out + in parameters. So the directions of
all sites are put in order of v_j^2 / (out + in) and kept from the largest on, as many as fit. No
other LoRA with as few parameters is closer to the trained one. Sites differ in what they have
learned, so ranks do too, and a site of which nothing is kept loses its adapter (after PARA, arXiv
2604.27796, which cuts at a value of v_j).

The values are not weighed further: by the norm of the site's weight or of its output on training
rows, or with directions taken from those outputs, cuts scored no better, mostly worse
(`examples/guides/measurements.md`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from autopeft import methods
from autopeft.errors import AdapterError
from autopeft.models.attach import Attached
from autopeft.models.lora_conversion import lora_factors
from autopeft.models.low_rank import Directions
from autopeft.models.method_hooks import ADAPTER_NAME
from autopeft.plan import AdapterPlan


def _size(directions: Directions) -> int:
    """Return the parameters of one direction."""
    return int(directions.left.shape[0] + directions.right.shape[1])


def _fill(directions: Directions, b: torch.Tensor, a: torch.Tensor, scaling: float) -> None:
    """Write as many directions into B and A as they have ranks."""
    rank = a.shape[0]
    root = directions.values[:rank].sqrt()
    b.copy_(directions.left[:, :rank] * root / scaling)
    a.copy_(root[:, None] * directions.right[:rank])


def _pairs(layer: Any, b: torch.Tensor, a: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return views of B (out, rank) and A (rank, in): the layer's, or those of each expert."""
    n = getattr(layer, "num_experts", 0)
    if not n:
        return [(b, a)]
    return [(b.view(b.shape[0], -1, n)[:, :, i], a.view(n, -1, a.shape[1])[i]) for i in range(n)]


class TrainedLora:
    """A copy of a trained LoRA, which can be cut to lower ranks after it was detached.

    A LoRA trained at a high rank and cut often scores better than one trained at the lower rank,
    and costs no training.

    Args:
        attached: A candidate whose methods have `can_cut_rank`.

    Raises:
        AdapterError: if another method is among them.
    """

    def __init__(self, attached: Attached) -> None:
        plan = attached.candidate.plan
        for name in plan.methods:
            if not methods.get(name).can_cut_rank:
                raise AdapterError("method", name, "has no ranks to cut", "cut a plan of LoRAs")
        self._plan = plan
        self._modules = attached.backbone.layout.modules
        self._directions = {
            path: [Directions.of_product(*pair) for pair in _pairs(layer, *lora_factors(layer))]
            for part in attached.parts
            for path, layer in part.adapters()
        }
        self._head = [p.detach().clone() for p in attached.head_parameters()]

    def cuts(self, divisors: Iterable[int]) -> tuple[AdapterPlan, ...]:
        """Return the plans with at most 1 / divisor of the parameters, a new head not counted.

        Those of which no adapter remains are left out.
        """
        modules = [self._site(spec.layer, spec.role) for spec in self._plan.specs]
        energies = [
            torch.stack([module.values.square() for module in site]).sum(0).tolist()
            for site in modules
        ]
        sizes = [sum(_size(module) for module in site) for site in modules]
        n_params = sum(size * spec.rank for size, spec in zip(sizes, self._plan.specs, strict=True))
        plans: dict[AdapterPlan, None] = {}
        for divisor in divisors:
            ranks = global_cut(energies, sizes, n_params // divisor)
            kept = zip(self._plan.specs, ranks, strict=True)
            plan = AdapterPlan(replace(spec, rank=rank) for spec, rank in kept if rank)
            if plan.specs:
                plans[plan] = None
        return tuple(plans)

    @torch.no_grad()
    def cut_into(self, attached: Attached) -> None:
        """Fill an attached candidate that has some of the sites, at lower ranks.

        Raises:
            AdapterError: if it has a site or a rank that this LoRA has not.
        """
        trained = {(spec.layer, spec.role): spec for spec in self._plan.specs}
        for spec in attached.candidate.plan.specs:
            own = trained.get((spec.layer, spec.role))
            if own is None or own.method != spec.method or own.rank < spec.rank:
                found = "no adapter" if own is None else f"{own.method} of rank {own.rank}"
                raise AdapterError(
                    "plan",
                    f"{spec.method} of rank {spec.rank} at layer {spec.layer} ({spec.role})",
                    f"cannot be cut from {found} there",
                    "lower the ranks of the trained plan only",
                )
        for part in attached.parts:
            for path, layer in part.adapters():
                b, a = layer.lora_B[ADAPTER_NAME].weight, layer.lora_A[ADAPTER_NAME].weight
                pairs = zip(self._directions[path], _pairs(layer, b, a), strict=True)
                for directions, pair in pairs:
                    _fill(directions, *pair, layer.scaling[ADAPTER_NAME])
        for parameter, value in zip(attached.head_parameters(), self._head, strict=True):
            parameter.copy_(value)

    def _site(self, layer: int, role: str) -> list[Directions]:
        return [each for path in self._modules[layer, role] for each in self._directions[path]]


def global_cut(
    energies: Sequence[Sequence[float]], sizes: Sequence[int], n_params: int
) -> list[int]:
    """Return each site's rank, as many directions as fit, those of most energy a parameter first.

    Args:
        energies: Of each site, what each direction holds (its squared singular value), falling.
        sizes: Of each site, the parameters of a direction.
        n_params: All that is kept may have so many.

    Example:
        >>> global_cut([[9.0, 4.0, 1.0], [6.0, 0.5]], [10, 20], 40)
        [2, 1]
    """
    order = sorted(
        (-energy / size, site)
        for site, (own, size) in enumerate(zip(energies, sizes, strict=True))
        for energy in own
    )
    ranks = [0] * len(sizes)
    for _, site in order:
        n_params -= sizes[site]
        if n_params < 0:
            break
        ranks[site] += 1
    return ranks
