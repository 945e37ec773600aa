"""On an accelerator the host waits for nothing in a training step."""

from __future__ import annotations

from typing import Any

import pytest
from pretended_device import NAME, World, pretended
from tiny_models import build

from autopeft import methods
from autopeft.models.attach import attach
from autopeft.models.backbone import Backbone
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.profiling.output_positions import narrow_modules
from autopeft.tasks.base import Task
from autopeft.tasks.data import TaskData
from autopeft.tasks.sft import SupervisedFineTuning
from autopeft.tasks.text_classification import TextClassification
from autopeft.training.activation_cache import ActivationCache
from autopeft.training.last_block import LastBlock
from autopeft.training.multi_trainer import MultiTrainer
from autopeft.training.setup import TrainingSetup
from autopeft.training.trainer import CHECK_EVERY, Trainer

N_STEPS = CHECK_EVERY["accelerator"]
EPOCH = 20
WINDOWS = {"bert": "first", "llama": "completion"}


@pytest.fixture
def task(model: str, request: pytest.FixtureRequest) -> tuple[Task, TaskData]:
    name = "classification_data" if model == "bert" else "causal_data"
    data: TaskData = request.getfixturevalue(name)
    task = TextClassification(data.labels, 0, None) if model == "bert" else SupervisedFineTuning()
    return task.bound(data), data


def _on_device(model: str) -> Backbone:
    backbone = build(model)
    backbone.model.to(NAME)
    return backbone


def _candidate(layers: tuple[int, ...], rank: int = 4) -> Candidate:
    specs = [LayerSpec(n, role, "lora", rank) for n in layers for role in ("attn.q", "attn.v")]
    return Candidate(AdapterPlan(specs), TrainSettings(1e-3, steps=200, batch_size=8))


def _setup(backbone: Backbone, model: str, task: Task, data: TaskData, way: str) -> TrainingSetup:
    parts: dict[str, Any] = {}
    module, layout = backbone.model, backbone.layout
    if way == "cache":
        cache = ActivationCache(module, layout.blocks, data, device=NAME, precision="bf16")
        parts["cache"] = cache.below(1)
    if way == "last block":
        narrow = narrow_modules(module, layout)
        window = WINDOWS[model]
        parts["last_block"] = LastBlock(
            module, layout.blocks[-1], narrow, task, window, precision="bf16"
        )
    return TrainingSetup(task, data, device=NAME, precision="bf16", **parts)


def _check(world: World, *, losses_read: int, copies: int) -> None:
    waits = dict(world.waits)
    reads = [key for key in waits if "trainer.py" in key[1]]
    assert sum(waits.pop(key) for key in reads) == losses_read
    assert not waits
    assert world.copies == copies * N_STEPS


@pytest.mark.parametrize(
    ("model", "way", "copies"),
    [("bert", "cache", 2), ("llama", "last block", 3), ("bert", "", 1), ("llama", "", 2)],
)
def test_a_step_waits_for_nothing_of_ours(
    model: str, way: str, copies: int, task: tuple[Task, TaskData]
) -> None:
    with pretended() as world:
        backbone = _on_device(model)
        setup = _setup(backbone, model, *task, way)
        with attach(backbone, _candidate((1,)), seed=0) as attached:
            trainer = Trainer(attached, setup, attached.candidate.train, seed=0)
            trainer.train_to(EPOCH if way == "cache" else N_STEPS)  # Checks and fills what it uses.
            world.clear()
            trainer.train_to(trainer.step + N_STEPS)
        _check(world, losses_read=1, copies=copies)


@pytest.mark.parametrize("model", ["llama"])
@pytest.mark.parametrize("method", ["waveft", "vblora", "adalora"])
def test_nor_does_a_step_of_a_method_with_constants(
    method: str, model: str, task: tuple[Task, TaskData]
) -> None:
    rank = methods.get(method).default_ranks[0]
    specs = [LayerSpec(n, role, method, rank) for n in (0, 1) for role in ("attn.q", "mlp.up")]
    train = TrainSettings(1e-3, steps=3 * N_STEPS, batch_size=8)
    with pretended() as world:
        backbone = _on_device(model)
        setup = _setup(backbone, model, *task, "")
        with attach(backbone, Candidate(AdapterPlan(specs), train), seed=0) as attached:
            trainer = Trainer(attached, setup, train, seed=0)
            trainer.train_to(N_STEPS)
            for end in (2 * N_STEPS, 3 * N_STEPS):
                world.clear()
                trainer.train_to(end)
                _check(world, losses_read=1, copies=2)


@pytest.mark.parametrize("model", ["llama"])
def test_nor_does_a_step_of_several_candidates(model: str, task: tuple[Task, TaskData]) -> None:
    with pretended() as world:
        backbone = _on_device(model)
        setup = _setup(backbone, model, *task, "")
        trainers = {}
        for index, layers in enumerate(((0, 1), (1,), (0,))):
            attached = attach(backbone, _candidate(layers, 2 + index), seed=index)
            trainers[index] = Trainer(attached, setup, attached.candidate.train, seed=index)
            attached.park()
        together = MultiTrainer(trainers, setup)
        together.train_to(N_STEPS)
        world.clear()
        together.train_to(2 * N_STEPS)
        _check(world, losses_read=3, copies=2)
