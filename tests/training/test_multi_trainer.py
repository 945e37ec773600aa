from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from training_samples import tiny_bert, tiny_llama

from autopeft.errors import MultiAdapterError, TrainingFailure
from autopeft.models.attach import attach
from autopeft.models.backbone import Backbone
from autopeft.models.multi_adapter import MultiAdapter
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.profiling.counters import LiveBytes
from autopeft.tasks.data import TaskData
from autopeft.tasks.sft import SupervisedFineTuning
from autopeft.tasks.text_classification import TextClassification
from autopeft.training.acceleration import NO_ACCELERATION, Acceleration
from autopeft.training.activation_cache import ActivationCache
from autopeft.training.multi_trainer import MultiTrainer
from autopeft.training.setup import TrainingSetup
from autopeft.training.trainer import Trainer

_STEPS = 12


def _bert() -> Backbone:
    return Backbone(tiny_bert().eval(), head=("classifier",), auto_class="")


def _llama() -> Backbone:
    return Backbone(tiny_llama().eval(), head=(), auto_class="")


def _candidates(rates: Sequence[float] = (1e-2, 3e-3, 2e-2)) -> list[Candidate]:
    """Unequal ranks, sites, methods and rates; the first block stays bare."""
    plans = [
        [LayerSpec(1, "attn.q", "lora", 2), LayerSpec(1, "mlp.up", "lora", 8)],
        [LayerSpec(1, "attn.q", "rslora", 4), LayerSpec(1, "attn.v", "ia3")],
        [LayerSpec(1, "mlp.up", "lora", 1), LayerSpec(1, "attn.v", "dora", 2)],
    ]
    return [
        Candidate(AdapterPlan(specs), TrainSettings(rate, steps=_STEPS, batch_size=8))
        for specs, rate in zip(plans, rates, strict=True)
    ]


class _Candidates:
    """Candidates of one model with their trainings."""

    def __init__(
        self,
        backbone: Backbone,
        task: Any,
        data: TaskData,
        *,
        candidates: list[Candidate] | None = None,
        seeds: Sequence[int] = (0, 0, 0),
        cached: bool = False,
    ) -> None:
        self.attached, self.trainings = {}, {}
        cache: Acceleration = NO_ACCELERATION
        if cached:
            cache = ActivationCache(backbone.model, backbone.layout.blocks, data).below(1)
        setup = TrainingSetup(task, data, cache=cache)
        for index, candidate in enumerate(candidates or _candidates()):
            attached = self.attached[index] = attach(backbone, candidate, seed=seeds[index])
            self.trainings[index] = Trainer(attached, setup, candidate.train, seed=seeds[index])
            attached.park()
        self.together = MultiAdapter(self.attached)
        self.trainer = MultiTrainer(self.trainings, setup)

    def values(self, index: int) -> list[torch.Tensor]:
        groups = self.attached[index].parameter_groups()
        return [p.detach().clone() for group in groups for p in group.parameters]

    def train_alone(self, index: int) -> list[torch.Tensor]:
        with self.together.alone(index):
            self.trainings[index].train_to(_STEPS)
        return self.values(index)


def _assert_equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("seeds", [(0, 0, 0), (1, 2, 3)])
def test_each_learns_what_it_learns_alone(
    classification_data: TaskData, seeds: tuple[int, ...], cached: bool
) -> None:
    data = classification_data
    task = TextClassification(data.labels, data.pad_id)
    alone = _Candidates(_bert(), task, data, seeds=seeds, cached=cached)
    together = _Candidates(_bert(), task, data, seeds=seeds, cached=cached)
    start = [together.values(index) for index in range(3)]
    together.trainer.train_to(5)
    together.trainer.train_to(_STEPS)
    for index in range(3):
        expected = alone.train_alone(index)
        _assert_equal(together.values(index), expected)
        moved = [float((a - b).abs().max()) for a, b in zip(start[index], expected, strict=True)]
        assert min(moved) > 1e-3
        assert together.trainings[index].step == _STEPS
        assert together.trainings[index].train_seconds > 0


@pytest.mark.parametrize("seeds", [(0, 0, 0), (1, 2, 3)])
def test_a_decoder_too(causal_data: TaskData, seeds: tuple[int, ...]) -> None:
    """With seeds of their own, rows of other lengths and numbers of tokens meet in a batch."""
    alone = _Candidates(_llama(), SupervisedFineTuning(), causal_data, seeds=seeds)
    together = _Candidates(_llama(), SupervisedFineTuning(), causal_data, seeds=seeds)
    together.trainer.train_to(_STEPS)
    for index in range(3):
        _assert_equal(together.values(index), alone.train_alone(index))


def test_dropping_a_candidate_does_not_change_the_others(classification_data: TaskData) -> None:
    data = classification_data
    task = TextClassification(data.labels, data.pad_id)
    alone = _Candidates(_bert(), task, data)
    together = _Candidates(_bert(), task, data)
    together.trainer.train_to(4)
    together.trainer.drop(1)
    stopped = together.values(1)
    together.trainer.train_to(_STEPS)
    assert together.trainings[1].step == 4
    _assert_equal(together.values(1), stopped)
    for index in (0, 2):
        _assert_equal(together.values(index), alone.train_alone(index))


def test_a_candidate_that_diverges_fails_alone(classification_data: TaskData) -> None:
    data = classification_data
    task = TextClassification(data.labels, data.pad_id)
    alone = _Candidates(_bert(), task, data)
    together = _Candidates(_bert(), task, data, candidates=_candidates((1e-2, 1e30, 2e-2)))
    together.trainer.train_to(_STEPS)
    assert list(together.trainer.failed) == [1]
    assert isinstance(together.trainer.failed[1], TrainingFailure)
    for index in (0, 2):
        _assert_equal(together.values(index), alone.train_alone(index))


def test_one_that_leaves_pays_for_its_own_steps(
    classification_data: TaskData, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = classification_data
    task = TextClassification(data.labels, data.pad_id)
    monkeypatch.setattr("autopeft.training.multi_trainer.Stopwatch.seconds", lambda _: 10.0)
    together = _Candidates(_bert(), task, data, candidates=_candidates((1e-2, 1e30, 2e-2)))
    together.trainer.train_to(_STEPS)
    steps = {index: trainer.step for index, trainer in together.trainings.items()}
    assert 0 < steps[1] < steps[0] == steps[2] == _STEPS
    for index, trainer in together.trainings.items():
        assert trainer.train_seconds == pytest.approx(10.0 * steps[index] / sum(steps.values()))


def test_one_that_leaves_frees_its_memory(classification_data: TaskData) -> None:
    data = classification_data
    task = TextClassification(data.labels, data.pad_id)

    def peak(*, leaves: bool) -> int:
        with LiveBytes() as live:
            them = _Candidates(_bert(), task, data, candidates=_candidates())
            if not leaves:
                them.trainer.drop(1)
                del them.attached[1], them.trainings[1], them.together
            them.trainer.train_to(4)
            if leaves:
                all_three = live.peak
                them.trainer.drop(1)
                del them.attached[1], them.trainings[1], them.together
            gc.collect()
            live.restart()
            them.trainer.train_to(8)
            if leaves:
                assert live.peak < 0.8 * all_three
            found: int = live.peak
        return found

    assert peak(leaves=True) == pytest.approx(peak(leaves=False), rel=0.01)


def test_a_model_whose_rows_meet_is_found_out(classification_data: TaskData) -> None:
    data = classification_data
    task = TextClassification(data.labels, data.pad_id)
    backbone = _bert()

    def mix(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 10 * output.mean(dim=0, keepdim=True)

    backbone.model.bert.embeddings.register_forward_hook(mix)
    them = _Candidates(backbone, task, data, seeds=(1, 2, 3))
    before = [them.values(index) for index in range(3)]
    with pytest.raises(MultiAdapterError, match="differ"):
        them.trainer.train_to(_STEPS)
    for index in range(3):
        assert them.trainings[index].step == 0
        for one, other in zip(them.values(index), before[index], strict=True):
            assert torch.equal(one, other)
