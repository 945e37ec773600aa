"""Candidates in a Trainer of transformers: same model, same counts, saved and loaded adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from training_samples import tiny_llama
from transformers import Trainer, TrainingArguments

import autopeft
from autopeft import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.engine.evaluate import TrialReport, TrialStopped
from autopeft.errors import AdapterError, TrainingFailure
from autopeft.integrations.transformers import (
    create_optimizer,
    get_peft_model,
    train,
    training_arguments,
)

PLANS = {
    "one": [LayerSpec(0, "attn.q", "lora", 2), LayerSpec(1, "attn.v", "lora", 4)],
    "mixed": [LayerSpec(0, "attn.q", "lora", 2), LayerSpec(1, "mlp.down", "ia3", 0)],
    "decomposed": [LayerSpec(1, "attn.q", "pissa", 2), LayerSpec(0, "attn.k", "dora", 2)],
    "empty": [],
}
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


def candidate_of(name: str, **changes: Any) -> Candidate:
    settings = {"steps": 6, "batch_size": 2, **changes}
    return Candidate(AdapterPlan(PLANS[name]), TrainSettings(1e-2, **settings))


def rows(n: int = 8) -> list[dict[str, Any]]:
    return [{"input_ids": IDS[i % 2], "labels": IDS[i % 2]} for i in range(n)]


def make_trainer(model: Any, candidate: Candidate, folder: Path) -> Trainer:
    arguments = training_arguments(candidate, seed=1, output_dir=str(folder), use_cpu=True)
    return Trainer(
        model, TrainingArguments(**arguments), train_dataset=rows(), eval_dataset=rows(4)
    )


def make_report(folder: Path, *, stop_at: int = 0, confirming: bool = False) -> Any:
    told: list[tuple[int, float]] = []

    def send(step: int, score: float) -> None:
        told.append((step, score))
        if step == stop_at:
            raise TrialStopped("stopped")

    folder.mkdir(exist_ok=True)
    report = TrialReport(rungs=(2, 4, 6), is_confirming=confirming, folder=folder, send=send)
    return report, told


@pytest.mark.parametrize("name", PLANS)
def test_a_candidate_is_a_peft_model(name: str) -> None:
    base = tiny_llama()
    before = base(IDS).logits
    model = get_peft_model(base, candidate_of(name), seed=0)
    assert isinstance(model, PeftModel)
    trainable, everything = model.get_nb_trainable_parameters()
    live = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (trainable, trainable == 0) == (live, name == "empty")
    assert everything >= trainable
    # An adapter that has not been trained changes nothing.
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, before)
    assert model.unload() is base
    assert torch.equal(base(IDS).logits, before)
    assert "forward" not in vars(base)


@pytest.mark.parametrize("name", PLANS)
def test_it_is_trained_reported_and_saved(name: str, tmp_path: Path) -> None:
    base, candidate = tiny_llama(), candidate_of(name)
    model = get_peft_model(base, candidate, seed=0)
    report, told = make_report(tmp_path / "adapter", confirming=True)
    found = train(make_trainer(model, candidate, tmp_path), report, test=rows(2))
    assert {"loss", "test_loss"} <= set(found)
    assert told == []  # A confirmation needs no rungs.
    after = model(IDS).logits
    with model.disable_adapter():
        moved = (model(IDS).logits - after).abs().max().item()
    assert (moved > 1e-4) == (name != "empty")
    model.unload()
    loaded = autopeft.load_adapter(base, tmp_path / "adapter")
    torch.testing.assert_close(loaded(IDS).logits, after, rtol=1e-4, atol=1e-5)


def test_rungs_are_reported_but_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    candidate = candidate_of("one")
    model = get_peft_model(tiny_llama(), candidate, seed=0)
    report, told = make_report(tmp_path / "adapter")
    found: Any = train(make_trainer(model, candidate, tmp_path), report)
    assert [step for step, _ in told] == [2, 4]
    assert found["loss"] < told[0][1]
    # The search shows its own progress.
    assert capsys.readouterr().out == ""


def test_a_stopped_trial_leaves_the_trainer(tmp_path: Path) -> None:
    candidate = candidate_of("one")
    model = get_peft_model(tiny_llama(), candidate, seed=0)
    report, told = make_report(tmp_path / "adapter", stop_at=2)
    with pytest.raises(TrialStopped):
        train(make_trainer(model, candidate, tmp_path), report)
    assert [step for step, _ in told] == [2]


def test_each_method_has_its_own_rate() -> None:
    candidate = candidate_of("mixed", method_rates=(("lora", 0.1), ("ia3", 0.2)))
    optimizer = create_optimizer(get_peft_model(tiny_llama(), candidate))
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.1, 0.2]


def test_the_best_checkpoint_can_be_loaded_again(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), candidate_of("mixed"), seed=0)
    model.save_pretrained(tmp_path)
    before = model(IDS).logits
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    model.load_adapter(tmp_path)
    assert torch.equal(model(IDS).logits, before)


def test_other_adapters_and_models_are_refused(tmp_path: Path) -> None:
    candidate = candidate_of("one")
    model = get_peft_model(tiny_llama(), candidate)
    with pytest.raises(AdapterError, match="a candidate holds one adapter"):
        model.add_adapter("second", model.peft_config["default"])
    with pytest.raises(AdapterError, match="no such adapter"):
        model.set_adapter("second")
    report, _ = make_report(tmp_path / "adapter")
    with pytest.raises(TrainingFailure, match="give it what get_peft_model returns"):
        train(make_trainer(tiny_llama(), candidate, tmp_path), report)
    trainer = make_trainer(model, candidate, tmp_path)
    with pytest.raises(TrainingFailure, match="the trainer's evaluate returns no f1"):
        train(trainer, report, metric="f1")
