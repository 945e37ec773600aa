from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from autopeft.errors import TrainingFailure
from autopeft.plan import TrainSettings
from autopeft.tasks.data import TaskData
from autopeft.tasks.sft import SupervisedFineTuning
from autopeft.tasks.text_classification import TextClassification
from autopeft.training.batching import rung_sample
from autopeft.training.precision import Precision
from autopeft.training.setup import TrainingSetup
from autopeft.training.trainer import Trainer, rate_factor, train_adapters_only

Build = Callable[..., Any]


def classifier(data: TaskData, metric: str | None = None) -> TextClassification:
    return TextClassification(data.labels, data.pad_id, metric)


def _setup(data: TaskData, precision: Precision = "fp32") -> TrainingSetup:
    return TrainingSetup(classifier(data), data, precision=precision)


def train_settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"learning_rate": 1e-2, "steps": 60, "batch_size": 16, **changes})


def test_it_learns_and_reports(classification_data: TaskData, bert_with_lora: Build) -> None:
    training = Trainer(
        bert_with_lora(), _setup(classification_data), train_settings(), seed=0, flops_per_step=10.0
    )
    reports = [training.advance(step) for step in (6, 20, 60)]
    assert [report.step for report in reports] == [6, 20, 60]
    assert reports[-1].metrics["accuracy"] > 0.85
    for report in reports:
        assert report.score == -report.loss
        assert report.flops == 10.0 * report.step
    assert all(a.seconds < b.seconds for a, b in pairwise(reports))
    assert training.evaluate("test").metrics["accuracy"] > 0.8


def test_a_minimized_quality_is_scored_by_the_loss_itself(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    task = classifier(classification_data, "loss")
    training = Trainer(
        bert_with_lora(), TrainingSetup(task, classification_data), train_settings(), seed=0
    )
    report = training.advance(2)
    assert report.score == report.loss > 0


def test_causal_lm_learns(causal_data: TaskData, llama_with_lora: Build) -> None:
    training = Trainer(
        llama_with_lora(),
        TrainingSetup(SupervisedFineTuning(), causal_data),
        train_settings(),
        seed=0,
    )
    first, last = [training.advance(step) for step in (1, 60)]
    assert last.loss < first.loss - 0.2
    assert last.metrics["token_accuracy"] >= 0.5


def test_the_same_seed_gives_the_same_result(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    def losses(seed: int, disturb: bool = False) -> list[float]:
        training = Trainer(
            bert_with_lora(dropout=0.3), _setup(classification_data), train_settings(), seed=seed
        )
        first = training.advance(4)
        if disturb:  # another user of the process's random numbers, between two rungs
            torch.manual_seed(99)
            torch.rand(10)
        return [first.loss, training.advance(9).loss]

    assert losses(0) == losses(0, disturb=True)
    assert losses(0) != losses(1)


def test_rungs_do_not_change_the_training(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    finals = []
    for rungs in ([12], [3, 7, 12]):
        training = Trainer(
            bert_with_lora(dropout=0.2), _setup(classification_data), train_settings(), seed=0
        )
        finals.append([training.advance(step).loss for step in rungs][-1])
    assert finals[0] == finals[1]


def test_only_planned_parameters_change(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    attached = bert_with_lora()
    before = {n: p.detach().clone() for n, p in attached.model.named_parameters()}
    training = Trainer(attached, _setup(classification_data), train_settings(), seed=0)
    training.train_to(3)
    for name, parameter in attached.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_a_diverged_loss_names_step_and_rate(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    attached = bert_with_lora(learning_rate=3e-3)
    training = Trainer(attached, _setup(classification_data), train_settings(), seed=0)
    training.train_to(2)
    with torch.no_grad():
        attached.model.classifier.weight.fill_(float("nan"))
    with pytest.raises(TrainingFailure, match=r"step 3 of 60 \(learning rate lora 0\.003"):
        training.train_to(10)


def test_a_loss_far_above_its_start_ends_the_training(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    setup = _setup(classification_data)
    training = Trainer(bert_with_lora(learning_rate=30.0), setup, train_settings(), seed=0)
    with pytest.raises(TrainingFailure, match=r"loss rose from \d.* at step \d+ of 60"):
        training.advance(60)
    assert training.step < 30


def test_easy_first_batches_end_no_training(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    class FirstAreEasy(TextClassification):
        """A task whose first batches the model solves already."""

        seen: list[torch.Tensor] = []  # noqa: RUF012

        def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
            ids = batch.tensors["input_ids"]
            self.seen += [ids] if len(self.seen) < 2 else []
            is_easy = any(torch.equal(ids, easy) for easy in self.seen)
            return super().loss(model, batch) * (0.01 if is_easy else 1.0)

    data = classification_data
    setup = TrainingSetup(FirstAreEasy(data.labels, data.pad_id, None), data)
    training = Trainer(bert_with_lora(), setup, train_settings(learning_rate=1e-5), seed=0)
    training.train_to(60)
    assert training.step == 60


def test_nothing_to_train_is_a_reference(causal_data: TaskData, llama_with_lora: Build) -> None:
    attached = llama_with_lora()
    attached.model.requires_grad_(False)
    training = Trainer(
        attached, TrainingSetup(SupervisedFineTuning(), causal_data), train_settings(), seed=0
    )
    first, last = [training.advance(step) for step in (1, 60)]
    assert first.loss == last.loss
    assert last.step == 60


def test_bf16_ends_near_fp32(classification_data: TaskData, bert_with_lora: Build) -> None:
    ends = {}
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    for precision in precisions:
        training = Trainer(
            bert_with_lora(), _setup(classification_data, precision), train_settings(), seed=0
        )
        training.train_to(60)
        ends[precision] = training.evaluate("validation", precision="fp32").loss
    assert ends["bf16"] == pytest.approx(ends["fp32"], abs=0.05)


def test_rate_rises_then_falls() -> None:
    rates = [rate_factor(step, 100, 0.1) for step in range(100)]
    assert rates[9] == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert all(0 < rate <= 1 for rate in rates)
    assert all(0 < rate_factor(s, 1, w) <= 1 for s in (0,) for w in (0.0, 0.1, 1.0))


def test_rungs_may_look_at_fewer_rows(classification_data: TaskData, bert_with_lora: Build) -> None:
    def run(rung_rows: int | None) -> Any:
        training = Trainer(
            bert_with_lora(),
            _setup(classification_data),
            train_settings(steps=6),
            seed=0,
            rung_rows=rung_rows,
        )
        reports = [training.advance(step) for step in (2, 6)]
        rows = rung_sample(len(classification_data.validation), rung_rows)
        return reports, training.evaluate("validation", rows=rows)

    (first, last), part = run(20)
    (full_first, full_last), _ = run(None)
    assert last.loss == full_last.loss
    assert first.loss != full_first.loss
    assert len(part.rows) == 20


def test_dropout_acts_in_adapters_only(bert_with_lora: Callable[..., Any]) -> None:
    model = bert_with_lora(dropout=0.3).model
    model.train()
    train_adapters_only(model)
    active = {n for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.training}
    every = {n for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert active == {name for name in every if "lora_dropout" in name}
    assert active < every


def test_an_adapter_can_say_that_it_is_one() -> None:
    adapter = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    adapter.is_autopeft_adapter = True  # type: ignore[assignment]
    model = nn.Sequential(nn.Dropout(0.5), adapter)
    train_adapters_only(model)
    assert not model[0].training
    assert adapter[1].training
