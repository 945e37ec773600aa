"""A model spread over several devices computes and learns what it does on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_device import NAME, index_of, pretended
from tiny_models import KINDS, batch_for, build, candidate_of, logits_of, plan_of

from autopeft import methods
from autopeft.errors import ModelError, SettingsError
from autopeft.models.attach import attach
from autopeft.models.backbone import Backbone, load_backbone
from autopeft.models.spread import device_map

MODELS = ("llama", "bert", "t5", "deberta-v2", "vit", "gpt2")
USUAL = "lora dora vblora adalora oft prefix prompt_tuning bottleneck vera randlora".split()


def _load(model: str, folder: Path, **more: Any) -> Backbone:
    if not folder.exists():
        build(model).model.save_pretrained(folder)
    return load_backbone(str(folder), auto_class=KINDS[model].auto_class, **more)


def _learn(backbone: Backbone, method: str, device: str) -> list[float]:
    """The losses of three steps."""
    plan = plan_of(backbone.topology, method, seed=0)
    if plan is None:
        pytest.skip(f"no site for {method}")
    losses = []
    batch = {name: tensor.to(device) for name, tensor in batch_for(backbone).items()}
    with attach(backbone, candidate_of(plan), seed=3) as attached:
        parameters = [p for group in attached.parameter_groups() for p in group.parameters]
        optimizer = torch.optim.AdamW(parameters, lr=0.01)
        for step in range(1, 4):
            loss = attached.model(**batch).loss
            if (penalty := attached.penalty()) is not None:
                loss = loss + penalty
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            attached.after_update(step)
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return losses


def _pairs() -> list[Any]:
    every = sorted(method.name for method in methods.all_methods())
    pairs = []
    for method in every:
        for j, model in enumerate(MODELS):
            is_usual = method in USUAL and USUAL.index(method) % len(MODELS) == j
            marks = [] if is_usual else [pytest.mark.nightly]
            if method == "shira":
                reason = "its sparse tensors cannot be pretended"
                marks.append(pytest.mark.xfail(raises=RuntimeError, reason=reason))
            pairs.append(pytest.param(method, model, marks=marks, id=f"{method}-{model}"))
    return pairs


@pytest.mark.parametrize("model", MODELS)
def test_a_model_on_two_devices_computes_the_same(model: str, tmp_path: Path) -> None:
    here = _load(model, tmp_path / "model")
    batch = batch_for(here)
    with pretended(2) as world:
        there = _load(model, tmp_path / "model", device=NAME, n_devices=2)
        places = [
            {index_of(p) for p in there.model.get_submodule(path).parameters()}
            for path in there.layout.blocks
        ]
        assert len({frozenset(place) for place in places}) > 1 or places[0] == {1}
        assert all(len(place) == 1 for place in places)
        world.clear()
        logits = logits_of(there.model, {name: t.to(NAME) for name, t in batch.items()})
        assert index_of(logits) == 0
        assert world.crossings > 0
        logits = logits.cpu()
    assert torch.allclose(logits, logits_of(here.model, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "model"), _pairs())
def test_adapters_on_two_devices_learn_the_same(method: str, model: str, tmp_path: Path) -> None:
    expected = _learn(_load(model, tmp_path / "model"), method, "cpu")
    with pretended(2):
        there = _load(model, tmp_path / "model", device=NAME, n_devices=2)
        assert _learn(there, method, NAME) == pytest.approx(expected, rel=1e-3)


def _map(n_blocks: int, memory: dict[str, float], **more: float) -> list[str]:
    """The device of each of equal blocks with 10 bytes."""
    model = torch.nn.Sequential(*[torch.nn.Linear(1, 1) for _ in range(n_blocks)])
    paths = [str(number) for number in range(n_blocks)]
    sizes = {"": more.get("outside", 0.0), **dict.fromkeys(paths, 10.0)}
    found = device_map(model, paths, memory, sizes, more.get("reserved", 0.0))
    return [found[path] for path in paths]


def test_blocks_are_shared_out_by_memory() -> None:
    equal = {"cuda:0": 100.0, "cuda:1": 100.0}
    assert _map(4, equal) == ["cuda:0"] * 2 + ["cuda:1"] * 2
    assert _map(4, equal, outside=20.0) == ["cuda:0"] + ["cuda:1"] * 3
    assert _map(4, equal, outside=20.0, reserved=40.0) == ["cuda:1"] * 4
    assert _map(4, {"cuda:0": 30.0, "cuda:1": 90.0}) == ["cuda:0"] + ["cuda:1"] * 3
    assert len(set(_map(9, dict.fromkeys(("cuda:0", "cuda:1", "cuda:2"), 50.0)))) == 3
    with pytest.raises(ModelError, match=r"weights need 120 .*, 100 .* are free on 2 devices"):
        _map(12, {"cuda:0": 50.0, "cuda:1": 50.0})


def test_devices_that_a_worker_lacks_are_refused(tmp_path: Path) -> None:
    with pretended(2), pytest.raises(SettingsError, match=r"gpus_per_worker=3: .* sees 2 of them"):
        _load("llama", tmp_path / "model", device=NAME, n_devices=3)
