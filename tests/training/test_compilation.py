"""Trainings with compiled blocks are those with plain ones, and are compiled where that pays."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_clock import FakeClock
from torch._dynamo.utils import counters

from autopeft.errors import OutOfTime
from autopeft.plan import TrainSettings
from autopeft.tasks.batch import Batch
from autopeft.tasks.data import TaskData
from autopeft.tasks.text_classification import TextClassification
from autopeft.training import compilation, step_clock, stopwatch
from autopeft.training.activation_cache import ActivationCache
from autopeft.training.compilation import BlockCompiler
from autopeft.training.precision import Precision
from autopeft.training.setup import TrainingSetup
from autopeft.training.step_clock import Deadline, StepClock
from autopeft.training.trainer import Trainer

Build = Callable[..., Any]
_BLOCKS = tuple(f"bert.encoder.layer.{i}" for i in range(3))
_STEPS = 6


@pytest.fixture
def _nothing_compiled() -> None:
    torch.compiler.reset()


class _Task(TextClassification):
    """A task whose passes take time by a clock: a plain one 1 s, a compiled one `compiled`."""

    def __init__(self, data: TaskData, clock: FakeClock, compiled: float) -> None:
        super().__init__(data.labels, data.pad_id)
        self.clock, self.compiled = clock, compiled

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        is_compiled = "forward" in vars(model.get_submodule(_BLOCKS[0]))
        self.clock.now += self.compiled if is_compiled else 1.0
        return super().loss(model, batch)


class _Timed(FakeClock):
    """A clock whose seconds pass while something is compiled, too."""

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        self.seconds = seconds

    def perf_counter(self) -> float:
        return self.now

    def backend(self, graph: Any, _inputs: Any) -> Any:
        self.now += self.seconds
        return graph.forward


def _training(
    attached: Any,
    data: TaskData,
    compiler: BlockCompiler | None,
    *,
    task: Any = None,
    steps: int = _STEPS,
    clock: StepClock | None = None,
    **setup: Any,
) -> Trainer:
    task = task or TextClassification(data.labels, data.pad_id)
    blocks = _BLOCKS[: attached.model.config.num_hidden_layers]
    whole = TrainingSetup(task, data, compiler=compiler, compiled=blocks, **setup)
    return Trainer(
        attached, whole, TrainSettings(1e-2, steps=steps, batch_size=8), seed=0, clock=clock
    )


def _trained(training: Trainer, to_step: int = _STEPS) -> torch.Tensor:
    """Train; return the parameters, one after another."""
    names = set(training.attached.model.state_dict())
    training.train_to(to_step)
    model = training.attached.model
    assert set(model.state_dict()) == names
    assert not any("forward" in vars(module) for module in model.modules())
    groups = training.attached.parameter_groups()
    return torch.cat([p.detach().flatten() for group in groups for p in group.parameters])


def _n_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("way", "precision"),
    [
        ({}, "fp32"),
        pytest.param({}, "bf16", marks=pytest.mark.nightly),
        ({"recomputed": _BLOCKS[1:]}, "bf16"),
        pytest.param({"micro_batch_tokens": 40}, "fp32", marks=pytest.mark.nightly),
        ({"cache": True}, "bf16"),
    ],
)
def test_a_training_is_that_with_plain_blocks(
    way: dict[str, Any], precision: Precision, classification_data: TaskData, bert_with_lora: Build
) -> None:
    found = []
    for compiler in (None, BlockCompiler(must_pay=False, backend="eager")):
        attached, more = bert_with_lora(), dict(way)
        if "cache" in way:
            model = attached.model
            cache = ActivationCache(model, _BLOCKS, classification_data, precision=precision)
            more = {"cache": cache.below(0)}
        training = _training(attached, classification_data, compiler, precision=precision, **more)
        found.append(_trained(training))
        assert (training.compile_seconds > 0) == (compiler is not None)
    assert compiler is not None
    assert not compiler.problem
    tolerance = {"fp32": 1e-4, "bf16": 2e-2}[precision]
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("_nothing_compiled")
def test_a_second_training_compiles_nothing_new(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    compiler, made = BlockCompiler(must_pay=False, backend="eager"), []
    for _ in range(2):
        before = _n_graphs()
        _trained(_training(bert_with_lora(), classification_data, compiler))
        made.append(_n_graphs() - before)
    assert made[0] > 0
    assert made[1] == 0


def test_dropout_is_compared_without_it(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    compiler = BlockCompiler(must_pay=False, backend="eager")
    _trained(_training(bert_with_lora(dropout=0.5), classification_data, compiler))
    assert not compiler.problem


def test_what_cannot_be_compiled_is_computed(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no C++ compiler")

    compiler = BlockCompiler(must_pay=False, backend=fails)
    plain = _trained(_training(bert_with_lora(), classification_data, None))
    with pytest.warns(UserWarning, match=r"torch_compile is off: .*no C\+\+ compiler"):
        found = _trained(_training(bert_with_lora(), classification_data, compiler))
    assert torch.equal(found, plain)
    assert "no C++ compiler" in compiler.problem
    # It is not tried again.
    assert torch.equal(_trained(_training(bert_with_lora(), classification_data, compiler)), plain)


def test_what_fails_at_a_later_length_is_computed(
    classification_data: TaskData, bert_with_lora: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = BlockCompiler(must_pay=False, backend="eager")
    training = _training(bert_with_lora(), classification_data, compiler)
    _trained(training, 2)
    steps = training._steps
    assert steps is not None

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("an odd length")

    monkeypatch.setattr(steps, "_call", fails)
    with pytest.warns(UserWarning, match="torch_compile is off: RuntimeError: an odd length"):
        found = _trained(training)
    plain = _trained(_training(bert_with_lora(), classification_data, None))
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_what_computes_something_else_is_not_used(
    classification_data: TaskData, bert_with_lora: Build
) -> None:
    def wrong(graph: Any, _inputs: Any) -> Any:
        # Of sizes, which a graph may return too, nothing is changed.
        return lambda *inputs: tuple(
            1.5 * each if isinstance(each, torch.Tensor) else each
            for each in graph.forward(*inputs)
        )

    compiler = BlockCompiler(must_pay=False, backend=wrong)
    plain = _trained(_training(bert_with_lora(), classification_data, None))
    with pytest.warns(UserWarning, match="torch_compile is off: results differ"):
        found = _trained(_training(bert_with_lora(), classification_data, compiler))
    assert torch.equal(found, plain)
    assert "other results" in compiler.problem


@pytest.mark.usefixtures("_nothing_compiled")
def test_too_many_kinds_of_blocks_end_it_for_one_training(
    classification_data: TaskData, bert_with_lora: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "MAX_GRAPHS", 1)
    compiler = BlockCompiler(must_pay=False, backend="eager")
    plain = _trained(_training(bert_with_lora([1]), classification_data, None))
    with pytest.warns(UserWarning, match="torch_compile is off: .*more than 1 kinds of blocks"):
        found = _trained(_training(bert_with_lora([1]), classification_data, compiler))
    assert torch.equal(found, plain)
    monkeypatch.undo()
    training = _training(bert_with_lora([1]), classification_data, compiler)
    _trained(training)
    assert training._steps is not None
    assert training._steps._is_used


def _measured(
    attached: Any,
    data: TaskData,
    monkeypatch: pytest.MonkeyPatch,
    *,
    compiled: float,
    steps: int = 200,
    to_step: int = _STEPS,
    seconds: float = 10.0,
) -> tuple[Trainer, BlockCompiler, _Timed]:
    clock = _Timed(seconds)
    clock.replace_in(monkeypatch, stopwatch, step_clock)
    compiler = BlockCompiler(must_pay=True, backend=clock.backend)
    task = _Task(data, clock, compiled)
    training = _training(attached, data, compiler, task=task, steps=steps)
    training.train_to(to_step)
    return training, compiler, clock


def test_auto_compiles_what_pays_and_says_from_when(
    classification_data: TaskData, bert_with_lora: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, compiler, _ = _measured(
        bert_with_lora(), classification_data, monkeypatch, compiled=0.75, to_step=50
    )
    spent = compiler.seconds_for(frozenset(["another"]))
    assert "torch_compile=auto pays from" in compiler.problem
    assert "a step takes 0.75 s compiled and 1 s plain" in compiler.problem
    assert list(compiler.saved_share.values()) == [pytest.approx(0.25)]
    assert spent >= 10.0
    # Compiling is the trial's time, but not the time of its steps.
    assert training.compile_seconds > 10.0
    assert training.train_seconds == pytest.approx(3 + 47 * 0.75, abs=2.0)


def test_auto_computes_what_does_not_pay(
    classification_data: TaskData, bert_with_lora: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = classification_data
    training, compiler, _ = _measured(
        bert_with_lora(), data, monkeypatch, compiled=1.25, to_step=50
    )
    assert "torch_compile=auto does not pay: " in compiler.problem
    assert training.train_seconds == pytest.approx(50)
    # The next training of the kind measures nothing.
    after = _training(bert_with_lora(), data, compiler, task=training.setup.task, steps=200)
    after.train_to(50)
    assert after.compile_seconds == 0
    assert after.train_seconds == pytest.approx(50)


def test_auto_does_not_measure_where_few_steps_are_left(
    classification_data: TaskData, bert_with_lora: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, compiler, _ = _measured(
        bert_with_lora(), classification_data, monkeypatch, compiled=0.1
    )
    # Three steps to the next report save less than a block takes to compile.
    assert training.compile_seconds == 0
    assert not compiler.problem
    training.train_to(100)
    assert training.compile_seconds > 0


@pytest.mark.usefixtures("_nothing_compiled")
def test_auto_counts_what_other_trainings_have_compiled(
    classification_data: TaskData, bert_with_lora: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = classification_data
    training, compiler, _ = _measured(
        bert_with_lora(), data, monkeypatch, compiled=0.5, to_step=100, seconds=500.0
    )
    assert training.compile_seconds > 500
    # The same shapes: nothing is to be compiled. Others: it would take longer than it saves.
    for layers, is_used in (None, True), ([2], False):
        after = _training(
            bert_with_lora(layers), data, compiler, task=training.setup.task, steps=200
        )
        after.train_to(100)
        assert after._steps is not None
        assert after._steps._is_used is is_used


def test_compiling_ends_at_the_deadline(
    classification_data: TaskData, bert_with_lora: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = _Timed(30.0)
    clock.replace_in(monkeypatch, stopwatch, step_clock)
    compiler = BlockCompiler(must_pay=False, backend=clock.backend)
    training = _training(
        bert_with_lora([0, 2]), classification_data, compiler, clock=StepClock(Deadline(20.0))
    )
    with pytest.raises(OutOfTime):
        training.train_to(_STEPS)
    assert training.step == 0
    assert training.compile_seconds == pytest.approx(30.0)


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_inductor_compiles_blocks(classification_data: TaskData, bert_with_lora: Build) -> None:
    found = []
    for compiler in (None, BlockCompiler(must_pay=False, options={"compile_threads": 1})):
        found.append(_trained(_training(bert_with_lora(depth=1), classification_data, compiler)))
    assert compiler is not None
    assert not compiler.problem
    assert _n_graphs() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
