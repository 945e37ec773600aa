"""Several candidates attached to one base model and trained in one batched forward pass.

The candidates' rows are stacked along the batch: rows 0..b-1 belong to the first one, rows b..2b-1
to the second, and so on. All that is frozen runs once over the whole batch. At an adapted site the
batch is split again: LoRAs are one batched product, padded to the highest rank, beside the base
module's own (as in PLoRA, arXiv 2508.02932, and Punica, arXiv 2310.18547); any other method runs
its own module on its own rows. Rows do not interact anywhere else in a transformer, so each
candidate learns what it would learn alone, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners import lora
from torch import nn

from autopeft import methods
from autopeft.errors import MultiAdapterError
from autopeft.methods import LINEAR_ROLES
from autopeft.models.attach import Attached
from autopeft.models.layout import Layout
from autopeft.models.method_hooks import ADAPTER_NAME
from autopeft.models.modules import replace_module
from autopeft.plan import Candidate


def can_share_batch(candidate: Candidate) -> bool:
    """Return whether a candidate learns beside others what it learns alone.

    It does not where random numbers are drawn at each step (dropout, PVeRA), since other numbers
    would be drawn, nor where an adapter changes more than one module's output row by row.
    """
    specs = candidate.plan.specs
    return (
        bool(specs)
        and candidate.train.dropout == 0.0
        and all(spec.role in (*LINEAR_ROLES, "norm") for spec in specs)
        and not any(methods.get(spec.method).draws_noise for spec in specs)
    )


def can_share_batch_in(candidate: Candidate, layout: Layout) -> bool:
    """Return whether its sites see whole batches; routed experts see some tokens of any row."""
    return all(
        spec.role == "norm" or len(layout.modules[spec.layer, spec.role]) == 1
        for spec in candidate.plan.specs
    )


class MultiAdapter:
    """Parked candidates that are in the model together within `placed`.

    Args:
        lanes: Index -> candidate; all of one base model, none attached now (`Attached.park`).
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

    @contextmanager
    def alone(self, index: int) -> Iterator[nn.Module]:
        """Yield the model with one candidate in it; restore the base model afterwards."""
        lane = self.lanes[index]
        lane.unpark()
        try:
            yield lane.model
        finally:
            lane.park()

    @contextmanager
    def placed(self) -> Iterator[nn.Module]:
        """Yield the model with all candidates in it; restore the base model afterwards."""
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
    """Return whether a layer is x -> W x + scaling B A x over the base model's own W."""
    return (
        type(layer) is lora.Linear
        # PiSSA and OLoRA have a changed copy. Over a Conv1D it is the same storage, transposed.
        and layer.get_base_layer().weight.data_ptr() == base.weight.data_ptr()
        and not layer.lora_variant
        and not layer.lora_bias[ADAPTER_NAME]
        and isinstance(layer.lora_dropout[ADAPTER_NAME], nn.Identity)
    )


class _Site(nn.Module):
    """The base model's own module at one path and each candidate's, None where it has none."""

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
        """Some models read a module's attributes before they call it (T5 its weight's dtype)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def _check(self, x: torch.Tensor) -> None:
        if x.shape[0] % self.n_lanes:
            raise MultiAdapterError(
                f"a module is given {x.shape[0]} rows for {self.n_lanes} candidates"
            )


class _SplitSite(_Site):
    """Each candidate's own module on its own rows."""

    def forward(self, x: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        """(lanes * b, ..., in) -> (lanes * b, ..., out)."""
        self._check(x)
        own = dict(self.own.items())
        parts = enumerate(x.chunk(self.n_lanes))
        return torch.cat([own.get(str(i), self.base)(part, *rest, **options) for i, part in parts])


class _LowRankSite(_Site):
    """The base module's product once for all, and the LoRAs in one batched product."""

    def __init__(self, base: nn.Module, lanes: Sequence[nn.Module | None]) -> None:
        super().__init__(base, lanes)
        layers: list[Any] = list(self.own.values())
        self._down = [layer.lora_A[ADAPTER_NAME].weight for layer in layers]
        self._up = [layer.lora_B[ADAPTER_NAME].weight for layer in layers]
        self._scalings = [float(layer.scaling[ADAPTER_NAME]) for layer in layers]
        self._rank = max(weight.shape[0] for weight in self._down)
        # Moved once: an index that comes from the host makes it wait.
        self._where = torch.tensor([*map(int, self.own)]).to(self._down[0].device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(lanes * b, ..., in) -> (lanes * b, ..., out)."""
        self._check(x)
        y: torch.Tensor = self.base(x)
        down = torch.stack([_padded(weight, 0, self._rank) for weight in self._down])
        scaled = (w * scaling for w, scaling in zip(self._up, self._scalings, strict=True))
        up = torch.stack([_padded(weight, 1, self._rank) for weight in scaled])
        rows = x.reshape(self.n_lanes, -1, x.shape[-1]).to(down.dtype)
        is_all = len(self._where) == self.n_lanes
        if not is_all:
            rows = rows.index_select(0, self._where)
        update = torch.bmm(torch.bmm(rows, down.mT), up.mT)  # (own, tokens, out)
        flat = y.reshape(self.n_lanes, -1, y.shape[-1])
        if is_all:
            flat = flat + update
        else:
            flat = flat.index_add(0, self._where, update.to(flat.dtype))
        return flat.reshape(y.shape).to(y.dtype)


def _padded(weight: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Pad with zeros to a size along an axis: they add nothing and get no gradient."""
    missing = size - weight.shape[axis]
    if not missing:
        return weight
    return nn.functional.pad(weight, (0, 0, 0, missing) if axis == 0 else (0, missing))
