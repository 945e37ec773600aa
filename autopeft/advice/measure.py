"""Scores every site of a loaded model on a few training rows: forward and backward, no training."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from autopeft.advice.scores import SCORES, SiteRows
from autopeft.engine.loaded_model import LoadedModel
from autopeft.errors import ModelError
from autopeft.methods import LINEAR_ROLES
from autopeft.models.layout import Site
from autopeft.searcher.space.space import SearchSpace
from autopeft.tasks.batch import Batch, collate

_MAX_TOKENS = 2048
"""Tokens of a batch that scores of the inputs look at."""


@dataclass(frozen=True)
class SiteScores:
    """The scores of sites.

    Attributes:
        values: Site -> score name -> value, mean over batches.
        unreached: Sites that the loss has no gradient at.
        broken: Sites where a score is infinite or no number.
        n_rows: Rows that were read.
    """

    values: Mapping[Site, Mapping[str, float]]
    unreached: tuple[Site, ...]
    broken: tuple[Site, ...]
    n_rows: int


def linear_sites(space: SearchSpace) -> list[Site]:
    """Return the sites of a space that are single linear modules, by layer and role."""
    specs = (spec for own in space.grid.sites.values() for spec in own)
    sites = {(spec.layer, spec.role) for spec in specs if spec.role in LINEAR_ROLES}
    return sorted(sites, key=lambda site: (site[0], LINEAR_ROLES.index(site[1])))


def measure_sites(
    base: LoadedModel, sites: Sequence[Site], *, rank: int, n_rows: int, seed: int
) -> SiteScores:
    """Score sites on some training rows, in fp32.

    Args:
        base: The model and its data.
        sites: Sites of linear modules.
        rank: Rank of the LoRA that is thought of.
        n_rows: Training rows to read, at most.
        seed: Decides which rows.

    Raises:
        ModelError: if the loss is no number.
    """
    model, task, data = base.backbone.model, base.setup.task, base.setup.data
    size = base.context.settings.rows_per_step
    order = np.random.default_rng(seed).permutation(len(data.train))[:n_rows]
    # Rows of similar length, so that little is padding.
    order = order[np.argsort(data.train.lengths[order], kind="stable")]
    # A block that runs several times has one weight, and is one site.
    by_path = {base.backbone.layout.modules[site][0]: site for site in reversed(sites)}
    found: defaultdict[Site, list[Mapping[str, float]]] = defaultdict(list)
    n_batches = 0
    for start in range(0, len(order), size):
        batch = collate(data, "train", order[start : start + size], base.setup.device)
        observer = _Observer(by_path, rank, batch)
        with observer.watching(model), torch.enable_grad():
            loss = task.loss(model, batch)
            if not math.isfinite(float(loss.detach())):
                shown = f"its loss on {len(batch.rows)} training rows is {float(loss.detach())}"
                raise ModelError("model", base.backbone.base_model, shown, "check model and rows")
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)
        for site, values in observer.finish().items():
            found[site].append(values)
        n_batches += 1
    means = {
        site: {name: float(np.mean([row[name] for row in rows])) for name in SCORES}
        for site, rows in found.items()
    }
    own = [site for site in sites if site in by_path.values()]
    unreached = [site for site in own if site not in means or means[site]["gradient"] == 0.0]
    broken = [
        site
        for site, values in means.items()
        if site not in unreached and not all(map(math.isfinite, values.values()))
    ]
    left_out = {*unreached, *broken}
    kept = {site: means[site] for site in own if site not in left_out}
    return SiteScores(kept, tuple(unreached), tuple(broken), len(order))


class _Observer:
    """Scores sites in one forward and backward pass, each as soon as its gradient is there.

    The weights stay frozen: their gradients follow from a module's input and its output's gradient,
    and only one is in memory at a time.
    """

    def __init__(self, sites: Mapping[str, Site], rank: int, batch: Batch) -> None:
        self._rank = rank
        self._sites = sites
        self._n_rows = len(batch.rows)
        mask = batch.tensors.get("attention_mask")
        self._is_token = None if mask is None else mask.bool()
        self._modules: dict[str, nn.Module] = {}
        self._n_calls: defaultdict[str, int] = defaultdict(int)
        self._seen: defaultdict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        self._scores: dict[Site, Mapping[str, float]] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watch the sites' modules."""
        with ExitStack() as stack:
            for path in self._sites:
                handle = model.get_submodule(path).register_forward_hook(
                    partial(self._after_forward, path)
                )
                stack.callback(handle.remove)
            yield

    def finish(self) -> Mapping[Site, Mapping[str, float]]:
        """Return the scores of the sites that got a gradient."""
        for path in tuple(self._seen):  # The loss does not read all of its calls.
            self._score(path)
        return self._scores

    def _after_forward(
        self, path: str, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor:
        """Ask for the gradient of the output, which needs none yet where all below is frozen."""
        if not torch.is_grad_enabled():
            return output
        if not output.requires_grad:
            output = output + torch.zeros((), device=output.device, requires_grad=True)
        self._modules[path] = module
        self._n_calls[path] += 1
        take = partial(self._after_backward, path, inputs[0].detach())
        output.register_hook(take)  # type: ignore[no-untyped-call]
        return output

    def _after_backward(self, path: str, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        self._seen[path].append((inputs, gradient))
        if len(self._seen[path]) == self._n_calls[path]:
            self._score(path)

    def _score(self, path: str) -> None:
        rows = self._rows(path, self._seen.pop(path))
        is_told = bool(rows.gradient.isfinite().all())
        self._scores[self._sites[path]] = {
            name: score.of(rows) if is_told else math.nan for name, score in SCORES.items()
        }

    def _rows(self, path: str, seen: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> SiteRows:
        module = self._modules[path]
        weight: torch.Tensor = module.weight.detach().float()  # type: ignore[operator]
        if isinstance(module, Conv1D):
            weight = weight.T
        inputs, outputs = (
            _joined([pair[i].float() for pair in seen], self._n_rows) for i in (0, 1)
        )
        tokens = torch.cat([self._tokens(x) for x, _ in seen]).float()
        flat = outputs.flatten(0, 1).T @ inputs.flatten(0, 1)
        if inputs.shape[1] ** 2 > weight.numel():
            energies = (outputs.mT @ inputs).square()
        else:  # The same, |sum_t d_t x_t^T|^2, by its tokens' products.
            energies = (outputs @ outputs.mT) * (inputs @ inputs.mT)
        # A row's own loss is that many times its part of the mean.
        energy = len(outputs) * float(energies.sum())
        return SiteRows(self._sites[path][0], weight, tokens, flat, energy, self._rank)

    def _tokens(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the inputs at real tokens, at most `_MAX_TOKENS` of them; shape (n, in)."""
        mask = self._is_token
        is_text = mask is not None and inputs.shape[:-1] == mask.shape
        tokens = inputs[mask] if is_text else inputs.flatten(0, -2)
        return tokens[:: -(-len(tokens) // _MAX_TOKENS)]


def _joined(parts: Sequence[torch.Tensor], n_rows: int) -> torch.Tensor:
    """Return the tensors of a module's calls as one, shape (rows, positions, width).

    The windows of an image, and the sequences of a row, are one after another.
    """
    width = parts[0].shape[-1]
    if any(part.numel() % (n_rows * width) for part in parts):
        n_rows = 1  # Packed sequences: rows cannot be told apart.
    return torch.cat([part.reshape(n_rows, -1, width) for part in parts], dim=1)
