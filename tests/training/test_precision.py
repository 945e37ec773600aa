from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretended_device import pretended
from tiny_models import KINDS, all_specs, batch_for, build, candidate_of, disturb, random_plan

from autopeft.errors import SettingsError
from autopeft.models.attach import attach
from autopeft.plan import AdapterPlan
from autopeft.tasks.batch import collate
from autopeft.tasks.data import TaskData
from autopeft.tasks.text_classification import TextClassification
from autopeft.training import precision as precision_module
from autopeft.training.evaluation import evaluate
from autopeft.training.precision import MIN_GAIN, autocast, choose_precision, rounded_once
from autopeft.training.setup import TrainingSetup

CONFIG = SimpleNamespace(hidden_size=32)


def test_a_precision_asked_for_is_taken() -> None:
    assert choose_precision("fp32", "cpu", CONFIG) == "fp32"
    assert choose_precision("bf16", "cpu", CONFIG) == "bf16"


@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen"),
    [(10.0, 5.0, "bf16"), (10.0, 10.0, "fp32"), (MIN_GAIN, 0.99, "bf16"), (MIN_GAIN, 1.01, "fp32")],
)
def test_auto_takes_bf16_if_it_is_measured_as_clearly_faster(
    fp32: float, bf16: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def seconds(_up: Any, _down: Any, _hidden: Any, precision: str, _device: str) -> float:
        measured.append(precision)
        return {"fp32": fp32, "bf16": bf16}[precision]

    monkeypatch.setattr(precision_module, "_seconds", seconds)
    precision_module._measured.cache_clear()
    try:
        assert [choose_precision("auto", "cpu", CONFIG) for _ in range(2)] == [chosen, chosen]
        assert measured == ["fp32", "bf16"]  # Once per process.
    finally:
        precision_module._measured.cache_clear()


def test_auto_measures_on_this_machine() -> None:
    precision_module._measured.cache_clear()
    assert choose_precision("auto", "cpu", CONFIG) in precision_module.PRECISIONS
    assert precision_module._measured.cache_info().misses == 1


@pytest.mark.parametrize(("is_supported", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_an_accelerator_is_what_it_computes_in(
    is_supported: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended():
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: is_supported)
        assert choose_precision("auto", "cuda", CONFIG) == chosen


def test_unknown_precision() -> None:
    with pytest.raises(SettingsError, match="no such precision"):
        choose_precision("fp8", "cpu", CONFIG)


def test_autocast_computes_in_what_it_says() -> None:
    layer, rows = torch.nn.Linear(4, 4), torch.ones(2, 4)
    with autocast("bf16", "cpu"):
        assert layer(rows).dtype == torch.bfloat16
    with autocast("fp32", "cpu"):
        assert layer(rows).dtype == torch.float32


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The loss and what it does to every trained parameter, in bf16."""
    model.zero_grad()
    with autocast("bf16", "cpu"):
        loss = model(**batch).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"": loss.detach(), **grads}


@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"whisper"}))
def test_nothing_changes_but_the_time(name: str) -> None:
    backbone = build(name)
    batch = batch_for(backbone)
    for seed in range(3):
        attached = attach(backbone, candidate_of(random_plan(backbone.topology, seed, 0.7)), seed=0)
        disturb(attached)
        usual = gradients(attached.model, batch)
        with rounded_once(attached.model, "bf16", "cpu"):
            found = gradients(attached.model, batch)
        assert usual.keys() == found.keys()
        for parameter, gradient in usual.items():
            assert torch.equal(gradient, found[parameter]), parameter
        attached.detach()


def test_every_method_is_served() -> None:
    """Also those that read the weight itself, and those that rewrite it."""
    backbone = build("llama")
    batch = batch_for(backbone)
    seen = set()
    for spec in all_specs(backbone.topology, ranks=(8, 2)):
        if spec.method in seen:
            continue
        seen.add(spec.method)
        attached = attach(backbone, candidate_of(AdapterPlan([spec])), seed=0)
        disturb(attached)
        usual = gradients(attached.model, batch)
        with rounded_once(attached.model, "bf16", "cpu"):
            found = gradients(attached.model, batch)
        assert all(torch.equal(usual[key], found[key]) for key in usual), spec
        attached.detach()


def test_it_leaves_modules_and_other_precisions_alone() -> None:
    model = build("bert").model
    linear: Any = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    x = torch.randn(2, 32)
    exact = linear(x)
    with rounded_once(model, "bf16", "cpu"):
        assert "forward" in vars(linear)
        assert torch.equal(linear(x), exact)  # Outside autocast.
        assert linear.weight.dtype == torch.float32
    assert "forward" not in vars(linear)
    with rounded_once(model, "fp32", "cpu"):
        assert "forward" not in vars(linear)
    with pytest.raises(KeyError), rounded_once(model, "bf16", "cpu"):
        raise KeyError
    assert "forward" not in vars(linear)


def test_what_is_trained_is_rounded_anew() -> None:
    model = torch.nn.Linear(4, 4)
    with rounded_once(model, "bf16", "cpu"):
        assert "forward" not in vars(model)
    model.requires_grad_(False)
    with rounded_once(model, "bf16", "cpu"), autocast("bf16", "cpu"):
        before = model(torch.ones(1, 4))
        model.weight.mul_(2)
        model.bias.mul_(2)
        assert torch.allclose(model(torch.ones(1, 4)), 2 * before)


def test_copies_that_change_the_result_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_module, "_IS_EXACT", {})
    monkeypatch.setattr(precision_module, "_with_copies", lambda module, x: x + 1)
    model, x = torch.nn.Linear(4, 4).requires_grad_(False), torch.ones(1, 4)
    with autocast("bf16", "cpu"):
        expected = model(x)
        with rounded_once(model, "bf16", "cpu"):
            with pytest.warns(UserWarning, match="rounding weights of Linear once is off"):
                model(x)
            assert torch.equal(model(x), expected)  # Told once.


def test_copies_go_with_their_weights() -> None:
    gc.collect()
    before = len(precision_module._COPIES)
    model = torch.nn.Linear(4, 4).requires_grad_(False)
    with rounded_once(model, "bf16", "cpu"), autocast("bf16", "cpu"):
        model(torch.ones(1, 4))
        first = precision_module._COPIES[model.weight][1]
        model(torch.ones(1, 4))
    assert precision_module._COPIES[model.weight][1] is first
    assert len(precision_module._COPIES) == before + 2
    del model
    gc.collect()
    assert len(precision_module._COPIES) == before


def test_an_evaluation_may_come_first(
    classification_data: TaskData, bert_with_lora: Callable[..., Any]
) -> None:
    """Nothing made in inference mode is kept for the trainings to come."""
    data, model = classification_data, bert_with_lora().model
    task = TextClassification(data.labels, data.pad_id)
    evaluate(model, TrainingSetup(task, data, precision="bf16"), "validation")
    with rounded_once(model, "bf16", "cpu"), autocast("bf16", "cpu"):
        loss = task.loss(model, collate(data, "train", data.train.source_rows[:4]))
    loss.backward()
    assert any(p.grad is not None for p in model.parameters())
