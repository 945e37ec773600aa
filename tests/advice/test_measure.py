"""Gradients that follow from inputs and outputs are those that torch gives the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import batch_for, build
from transformers import AutoModelForSequenceClassification

from autopeft.advice.measure import _Observer, linear_sites, measure_sites
from autopeft.engine.loaded_model import LoadedModel
from autopeft.methods import LINEAR_ROLES
from autopeft.preparing.prepare import prepare
from autopeft.settings import SearchSettings
from autopeft.tasks.batch import Batch

RANK = 2


def _energies(model: Any, weight: Any, inputs: dict[str, Any]) -> tuple[float, float]:
    """Norm of the weight's gradient, and PAGE without its factor, each row backward alone."""
    logits = model(**inputs).logits
    losses = logits.flatten(1).square().mean(dim=1)
    (whole,) = torch.autograd.grad(losses.mean(), weight, retain_graph=True)
    alone = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses]
    return float(whole.norm()), float(np.mean([float(g.square().sum()) for g in alone]))


@pytest.mark.parametrize(
    ("kind", "length"),
    [("bert", 9), ("bert", 60), ("gpt2", 9), ("albert", 9), ("opt", 9), ("bart", 9), ("vit", 9)],
)
def test_gradients_of_frozen_weights(kind: str, length: int) -> None:
    backbone = build(kind)
    model: Any = backbone.model
    modules = backbone.layout.modules
    by_path = {paths[0]: site for site, paths in modules.items() if site[1] in LINEAR_ROLES}
    inputs = batch_for(backbone, length=length)
    rows = np.arange(len(next(iter(inputs.values()))))
    mask = {k: v for k, v in inputs.items() if k == "attention_mask"}
    observer = _Observer(by_path, RANK, Batch("train", rows, rows, mask, ()))
    with observer.watching(model):
        model(**inputs).logits.square().mean().backward()
    found = observer.finish()
    assert found.keys() == set(by_path.values())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for path, site in by_path.items():
        weight = model.get_submodule(path).weight.requires_grad_(True)
        norm, energy = _energies(model, weight, inputs)
        weight.requires_grad_(False)
        assert found[site]["gradient"] == pytest.approx(norm, rel=1e-3), path
        width = backbone.topology.shape(*site)[1]
        assert found[site]["PAGE"] == pytest.approx(4 * RANK * energy / (3 * width), rel=1e-3), path
    assert not any(module._forward_hooks for module in model.modules())


def _loaded(model: Path, data: Path) -> tuple[LoadedModel, list[tuple[int, str]]]:
    asked = {"model": str(model), "data": str(data), "workers": 1, "batch_size": 8}
    ready = prepare(SearchSettings.from_mapping(asked))
    return LoadedModel(ready.context()), linear_sites(ready.space)


def test_sites_without_gradient_or_score_are_told_apart(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    torch.nn.init.zeros_(model.bert.encoder.layer[0].attention.output.dense.weight)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tiny_model / name).read_text())
    base, sites = _loaded(tmp_path, tiny_data)
    found = measure_sites(base, sites, rank=RANK, n_rows=20, seed=0)
    assert found.unreached == ((0, "attn.q"), (0, "attn.k"), (0, "attn.v"))
    assert found.broken == ((0, "attn.o"),)
    assert set(found.values) == {*sites} - {*found.unreached, *found.broken}
    assert found.n_rows == 20


def test_the_seed_decides_the_rows_and_nothing_else_is_random(
    tiny_model: Path, tiny_data: Path
) -> None:
    base, sites = _loaded(tiny_model, tiny_data)
    first, again, other = (
        measure_sites(base, sites, rank=RANK, n_rows=8, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first.values != other.values
