"""Several candidates on one base model, trained in one batched forward.

A pack stands its candidates side by side along the batch: rows 0..b-1 belong to the first one, rows
b..2b-1 to the second, and so on. All that is frozen runs once over the whole batch. Where adapters
sit, a site takes the batch apart again. LoRAs are one batched product of padded ranks beside the
base's own (as in PLoRA, arXiv 2508.02932, and Punica, arXiv 2310.18547); any other method runs its
own module on its own rows. Rows meet nowhere else in a transformer, so each candidate learns what
it would learn alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners import lora
from torch import nn

from autopeft import methods
from autopeft.errors import PackingError
from autopeft.methods import LINEAR_ROLES
from autopeft.models.attach import Attached, replace_module
from autopeft.models.method_hooks import ADAPTER_NAME
from autopeft.models.topology import Layout
from autopeft.plan import Candidate


def can_be_packed(candidate: Candidate) -> bool:
    """Whether a candidate learns in a pack what it learns alone.

    Not where random numbers are drawn at each step (dropout, PVeRA), since a pack would draw
    others, and not where an adapter changes more than one module's output row by row.
    """
    specs = candidate.plan.specs
    return (
        bool(specs)
        and candidate.train.dropout == 0.0
        and all(spec.role in (*LINEAR_ROLES, "norm") for spec in specs)
        and not any(methods.get(spec.method).draws_noise for spec in specs)
    )


def fits_a_pack(candidate: Candidate, layout: Layout) -> bool:
    """Whether its sites see whole batches: those of routed experts see some tokens of any row."""
    return all(
        spec.role == "norm" or len(layout.modules[spec.layer, spec.role]) == 1
        for spec in candidate.plan.specs
    )


class Pack:
    """Parked candidates, in place together within `placed`.

    Args:
        lanes: Index -> a candidate; all of one base model, none attached now (`Attached.park`).
    """

    def __init__(self, lanes: Mapping[int, Attached]) -> None:
        self.lanes = dict(lanes)
        each = list(self.lanes.values())
        self.model = each[0].model
        paths = dict.fromkeys(path for lane in each for path in lane.placed)
        self._sites: Mapping[str, nn.Module] = {
            path: _site(self.model.get_submodule(path), [lane.placed.get(path) for lane in each])
            for path in paths
        }

    def keeping(self, indices: Sequence[int]) -> Pack:
        """A pack of some of them, which keep their indices."""
        return Pack({index: self.lanes[index] for index in indices})

    @contextmanager
    def alone(self, index: int) -> Iterator[nn.Module]:
        """The model with one candidate in it; afterwards the base model as it was."""
        lane = self.lanes[index]
        lane.unpark()
        try:
            yield lane.model
        finally:
            lane.park()

    @contextmanager
    def placed(self) -> Iterator[nn.Module]:
        """The model with all lanes in it; afterwards the base model as it was."""
        originals = {path: self.model.get_submodule(path) for path in self._sites}
        try:
            for path, site in self._sites.items():
                replace_module(self.model, path, site)
            yield self.model
        finally:
            for path, original in originals.items():
                replace_module(self.model, path, original)


def _site(base: nn.Module, lanes: Sequence[nn.Module | None]) -> nn.Module:
    if all(lane is None or _is_plain_lora(lane, base) for lane in lanes):
        return _LowRankSite(base, lanes)
    return _SplitSite(base, lanes)


def _is_plain_lora(layer: Any, base: Any) -> bool:
    """Whether a layer is x -> W x + scaling B A x over the base model's own W, and nothing else."""
    return (
        type(layer) is lora.Linear
        # PiSSA and OLoRA have a changed copy. Over a Conv1D it is the same storage, transposed.
        and layer.get_base_layer().weight.data_ptr() == base.weight.data_ptr()
        and not layer.lora_variant
        and not layer.lora_bias[ADAPTER_NAME]
        and isinstance(layer.lora_dropout[ADAPTER_NAME], nn.Identity)
    )


class _Site(nn.Module):
    """What the lanes have at one path.

    Args:
        base: The base model's own module.
        lanes: Each lane's module there, None where it has none.
    """

    base: nn.Module
    own: nn.ModuleDict

    def __init__(self, base: nn.Module, lanes: Sequence[nn.Module | None]) -> None:
        super().__init__()
        self.base = base
        self.n_lanes = len(lanes)
        self.own = nn.ModuleDict(
            {str(index): lane for index, lane in enumerate(lanes) if lane is not None}
        )

    def __getattr__(self, name: str) -> Any:
        """Some models look at a module's weight before they call it (T5 at its dtype)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def _check(self, x: torch.Tensor) -> None:
        if x.shape[0] % self.n_lanes:
            raise PackingError(f"a module is given {x.shape[0]} rows for {self.n_lanes} candidates")


class _SplitSite(_Site):
    """Each lane's own module on its own rows."""

    def forward(self, x: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        """(lanes * b, ..., in) -> (lanes * b, ..., out)."""
        self._check(x)
        parts = [
            (self.own[str(index)] if str(index) in self.own else self.base)(part, *rest, **options)
            for index, part in enumerate(x.chunk(self.n_lanes))
        ]
        return torch.cat(parts)


class _LowRankSite(_Site):
    """The base's product once for all lanes, and their LoRAs in one batched product."""

    def __init__(self, base: nn.Module, lanes: Sequence[nn.Module | None]) -> None:
        super().__init__(base, lanes)
        layers: list[Any] = list(self.own.values())
        self._down = [layer.lora_A[ADAPTER_NAME].weight for layer in layers]
        self._up = [layer.lora_B[ADAPTER_NAME].weight for layer in layers]
        self._scalings = [float(layer.scaling[ADAPTER_NAME]) for layer in layers]
        self._rank = max(weight.shape[0] for weight in self._down)
        self._whose = [int(index) for index in self.own]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(lanes * b, ..., in) -> (lanes * b, ..., out)."""
        self._check(x)
        y: torch.Tensor = self.base(x)
        down = torch.stack([_padded(weight, 0, self._rank) for weight in self._down])
        up = torch.stack(
            [
                _padded(weight * scaling, 1, self._rank)
                for weight, scaling in zip(self._up, self._scalings, strict=True)
            ]
        )
        rows = x.reshape(self.n_lanes, -1, x.shape[-1]).to(down.dtype)
        is_all = len(self._whose) == self.n_lanes
        if not is_all:
            rows = rows[self._whose]
        update = torch.bmm(torch.bmm(rows, down.mT), up.mT)  # (own, tokens, out)
        flat = y.reshape(self.n_lanes, -1, y.shape[-1])
        if is_all:
            flat = flat + update
        else:
            where = torch.tensor(self._whose, device=y.device)
            flat = flat.index_add(0, where, update.to(flat.dtype))
        return flat.reshape(y.shape).to(y.dtype)


def _padded(weight: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Zeros beyond its own rank: they add nothing, and no gradient reaches past them."""
    missing = size - weight.shape[axis]
    if not missing:
        return weight
    return nn.functional.pad(weight, (0, 0, 0, missing) if axis == 0 else (0, missing))
