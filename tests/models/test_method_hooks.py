from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.boft import layer as boft_layer
from tiny_models import batch_for, build, candidate_of, disturb, logits_of
from transformers import BertConfig, BertForSequenceClassification

from autopeft import methods
from autopeft.models.attach import Attached, attach
from autopeft.models.backbone import Backbone
from autopeft.models.method_hooks import _HOOKS, MethodHooks, hooks_for, no_boft_extension
from autopeft.models.saving import load_attached, save_adapter
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.tasks.data import TaskData
from autopeft.tasks.text_classification import TextClassification
from autopeft.training.setup import TrainingSetup
from autopeft.training.trainer import Trainer

_PSOFT = AdapterPlan(
    LayerSpec(i, role, "psoft", 8) for i in range(2) for role in ("attn.q", "mlp.up")
)


def _turned(matrix: torch.Tensor, **kwargs: Any) -> Any:
    """A decomposition as right as torch's, with the other sign for every second direction."""
    left, values, right = torch.svd(matrix)
    turn = torch.ones(len(values))
    turn[::2] = -1
    return left * turn, values, (right * turn).T


def test_a_rotation_is_loaded_where_singular_vectors_point_the_other_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = build("bert")
    batch = batch_for(backbone)
    with attach(backbone, candidate_of(_PSOFT), seed=0) as attached:
        base = logits_of(attached.model, batch)
        disturb(attached)
        logits = logits_of(attached.model, batch)
        save_adapter(attached, tmp_path)
    assert not torch.allclose(logits, base, atol=1e-4)
    monkeypatch.setattr(torch.linalg, "svd", _turned)
    reloaded = load_attached(build("bert").model, tmp_path)
    torch.testing.assert_close(logits_of(reloaded.model, batch), logits, rtol=1e-4, atol=1e-5)


def _backbone() -> Backbone:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=2,
        pad_token_id=0,
    )
    return Backbone(
        BertForSequenceClassification(config).eval(),
        head=("classifier",),
        auto_class="AutoModelForSequenceClassification",
    )


def _candidate(rank: int, steps: int, method: str = "adalora") -> Candidate:
    plan = AdapterPlan(
        LayerSpec(layer, role, method, rank) for layer in range(3) for role in ("attn.q", "attn.v")
    )
    return Candidate(plan, TrainSettings(5e-2, steps=steps, batch_size=16))


def _training(attached: Attached, data: TaskData) -> Trainer:
    task = TextClassification(data.labels, data.pad_id, None)
    return Trainer(attached, TrainingSetup(task, data), attached.candidate.train, seed=0)


def _kept(attached: Attached) -> list[int]:
    """Triplets that still do something, site by site."""
    (part,) = attached.parts
    layers: list[Any] = list(part.layers.values())
    return [int((layer.lora_E["default"] != 0).sum()) for layer in layers]


def _penalty(attached: Attached) -> float:
    penalty = attached.penalty()
    assert penalty is not None
    return float(penalty.detach())


def test_adalora_gives_its_ranks_to_the_sites_that_need_them(
    classification_data: TaskData, tmp_path: Path
) -> None:
    backbone = _backbone()
    with attach(backbone, _candidate(4, steps=60), seed=0) as attached:
        training = _training(attached, classification_data)
        at_first = _penalty(attached)
        training.train_to(6)
        assert _kept(attached) == [6] * 6  # Nothing is dropped while it warms up.
        training.train_to(12)
        assert 24 < sum(_kept(attached)) < 36  # Most are dropped early.
        training.train_to(43)
        settled = _kept(attached)
        assert sum(settled) == 24
        report = training.advance(60)
        assert _kept(attached) == settled
        assert len(set(settled)) > 1
        assert _penalty(attached) < 0.7 * at_first
        assert report.loss < 0.65

        ids = torch.arange(5, 15)[None]
        logits = attached.model(ids).logits
        save_adapter(attached, tmp_path, base_model="tiny")
    loaded = load_attached(_backbone().model, tmp_path)
    assert torch.equal(loaded.model(ids).logits, logits)
    assert _kept(loaded) == settled


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_a_training_may_be_short(steps: int, classification_data: TaskData) -> None:
    with attach(_backbone(), _candidate(1, steps), seed=0) as attached:
        _training(attached, classification_data).train_to(steps)
        assert sum(_kept(attached)) == 6


def test_only_adalora_has_a_penalty() -> None:
    backbone = _backbone()
    with attach(backbone, _candidate(4, 10, "lora"), seed=0) as attached:
        assert attached.penalty() is None
    with attach(backbone, _candidate(4, 10), seed=0) as attached:
        # peft's own term, for a whole model: 0.5 times the mean distance from orthogonality.
        (part,) = attached.parts
        layers: list[Any] = list(part.layers.values())
        matrices = [m for x in layers for m in (x.lora_A["default"], x.lora_B["default"].T)]
        distances = [torch.norm(m @ m.T - torch.eye(6)).item() for m in matrices]
        assert _penalty(attached) == pytest.approx(0.5 * sum(distances) / len(distances))


def test_every_method_with_hooks_exists_and_others_have_none() -> None:
    names = {method.name for method in methods.all_methods()}
    assert set(_HOOKS) <= names
    assert type(hooks_for("lora")) is MethodHooks
    assert hooks_for("lora").training_hook(None) is None


def test_peft_compiles_nothing_for_boft_and_is_as_before_afterwards() -> None:
    before = boft_layer._FBD_CUDA
    with no_boft_extension():
        assert boft_layer.get_fbd_cuda() is False
    assert boft_layer._FBD_CUDA is before


def test_a_module_passes_for_a_plain_linear_one_only_while_glora_is_injected() -> None:
    class Own(torch.nn.Linear):
        pass

    holder = torch.nn.Module()
    holder.add_module("m", Own(2, 2))
    with hooks_for("glora").around_injection(holder):
        assert type(holder.m) is torch.nn.Linear
    assert type(holder.m) is Own
