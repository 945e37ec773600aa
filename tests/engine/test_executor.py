"""Several jobs on one worker: the messages are those of each job alone; nothing leaks."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_clock import FakeClock
from restored import restored
from safetensors.torch import load_file
from tiny_models import assert_same_state, random_plan, state_of

from autopeft.costs import Price
from autopeft.costs.objectives import COSTS, Cost
from autopeft.engine import executor as executor_module
from autopeft.engine import loaded_model
from autopeft.engine.executor import Executor
from autopeft.engine.messages import (
    ConfirmMessage,
    FailureMessage,
    Job,
    Message,
    RungMessage,
    StepMessage,
    TimeUpMessage,
)
from autopeft.errors import MultiAdapterError
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.preparing.prepare import prepare
from autopeft.preparing.prepared import PreparedSearch
from autopeft.settings import SearchSettings
from autopeft.tasks.batch import Batch
from autopeft.training import precision, step_clock
from autopeft.training import trainer as trainer_module
from autopeft.training.acceleration import NO_ACCELERATION
from autopeft.training.compilation import BlockCompiler
from autopeft.training.loss_watch import LossWatch
from autopeft.training.multi_trainer import MultiTrainer
from autopeft.training.step_clock import Deadline
from autopeft.training.trainer import Trainer

_STEPS = 80
_COSTS = Price(1, 4, 8e6, 1000)
_TRIALS = 80
_PLANS = 16


@pytest.fixture(scope="module")
def ready(tiny_model: Path, tiny_data: Path) -> PreparedSearch:
    settings = {
        "model": str(tiny_model),
        "data": str(tiny_data),
        "steps": _STEPS,
        "batch_size": 8,
        "max_length": 16,
        "precision": "fp32",
        "budget": "9trials",
        "trials_per_worker": 3,
    }
    return prepare(SearchSettings.from_mapping(settings))


@pytest.fixture
def executor(ready: PreparedSearch) -> Executor:
    return Executor(ready.context())


def _candidate(rank: int, rate: float = 1e-2, **train: Any) -> Candidate:
    specs = [LayerSpec(1, "attn.q", "lora", rank), LayerSpec(1, "attn.v", "ia3")]
    settings = {"steps": _STEPS, "batch_size": 8, **train}
    return Candidate(AdapterPlan(specs[: 1 + rank % 2]), TrainSettings(rate, **settings))


def _jobs(kind: Any = "search", rates: tuple[float, ...] = (1e-2, 2e-2, 5e-3)) -> list[Job]:
    return [Job(kind, _candidate(i + 1, rate), _COSTS, 3, i) for i, rate in enumerate(rates)]


def _alone(executor: Executor, job: Job, n: int) -> list[Message]:
    executor.begin([job])
    messages = [executor.advance()[0] for _ in range(n)]
    executor.clear()
    return messages


def _same(one: Message, other: Message) -> bool:
    if isinstance(one, RungMessage) and isinstance(other, RungMessage):
        return (one.report.step, one.is_last) == (other.report.step, other.is_last) and (
            one.report.loss == pytest.approx(other.report.loss, rel=1e-3)
        )
    return type(one) is type(other)


def test_rungs_are_those_of_each_alone(executor: Executor, ready: PreparedSearch) -> None:
    jobs = _jobs()
    expected = [_alone(executor, job, len(ready.rungs)) for job in jobs]
    executor.begin(jobs)
    for rung in range(len(ready.rungs)):
        messages = executor.advance()
        assert sorted(messages) == [0, 1, 2]
        assert all(_same(messages[i], expected[i][rung]) for i in range(3))
        assert all(m.activity.train > 0 for m in messages.values())
    assert executor.trains_together
    assert executor.advance() == {}
    assert executor.backbone.attached is None


def test_a_stopped_job_sends_nothing_more(executor: Executor, ready: PreparedSearch) -> None:
    jobs = _jobs()
    expected = [_alone(executor, job, len(ready.rungs)) for job in jobs]
    executor.begin(jobs)
    executor.advance()
    executor.drop([1])
    messages = executor.advance()
    assert sorted(messages) == [0, 2]
    assert all(_same(messages[i], expected[i][1]) for i in messages)
    executor.clear()


def test_confirmations_hand_their_adapters_back(executor: Executor) -> None:
    jobs = [Job("confirm", _candidate(2), _COSTS, seed) for seed in (1, 2, 3)]
    expected = [_alone(executor, job, 1)[0] for job in jobs]
    executor.begin(jobs)
    messages = executor.advance()
    for index, alone in enumerate(expected):
        got = messages[index]
        assert isinstance(got, ConfirmMessage)
        assert isinstance(alone, ConfirmMessage)
        assert got.score.seed == alone.score.seed == index + 1
        assert got.score.test["loss"] == pytest.approx(alone.score.test["loss"], rel=1e-3)
        assert set(got.files) == set(alone.files)
    assert executor.backbone.attached is None


def test_one_fails_and_the_others_go_on(executor: Executor, ready: PreparedSearch) -> None:
    executor.begin(_jobs(rates=(1e-2, 1e30, 5e-3)))
    seen: dict[int, list[Message]] = {0: [], 1: [], 2: []}
    for _ in ready.rungs:
        for index, message in executor.advance().items():
            seen[index].append(message)
    assert [type(m) for m in seen[1]] == [FailureMessage]
    assert [len(seen[i]) for i in (0, 2)] == [len(ready.rungs)] * 2


@pytest.mark.parametrize("way", [{"gradient_checkpointing": True}, {"micro_batch_tokens": 16}])
def test_what_saves_memory_changes_no_score(ready: PreparedSearch, way: dict[str, Any]) -> None:
    context = ready.context()
    settings = replace(context.settings, trials_per_worker=None, **way)
    scores = []
    for each in (context, replace(context, settings=settings)):
        executor = Executor(each)
        executor.begin(_jobs()[:2])
        messages = executor.advance()
        assert all(isinstance(m, RungMessage) for m in messages.values()), messages
        scores.append([m.report.score for m in messages.values() if isinstance(m, RungMessage)])
        executor.clear()
    assert not executor.trains_together
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert len(scores[0]) == 2


def test_compiled_blocks_change_no_score_and_leave_the_model_as_it_was(
    ready: PreparedSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiler(*, must_pay: bool, options: Any) -> BlockCompiler:
        return BlockCompiler(must_pay=must_pay, backend="aot_eager")

    monkeypatch.setattr(loaded_model, "BlockCompiler", compiler)
    context = ready.context()
    settings = replace(context.settings, trials_per_worker=None, torch_compile=True)
    candidate = Candidate(
        AdapterPlan([LayerSpec(0, "attn.q", "lora", 2)]),
        TrainSettings(1e-2, steps=_STEPS, batch_size=8),
    )
    found = []
    for each in (context, replace(context, settings=settings)):
        executor = Executor(each)
        before = state_of(executor.backbone)
        executor.begin([Job("confirm", candidate, _COSTS, 1)])
        (message,) = executor.advance().values()
        assert isinstance(message, ConfirmMessage), message
        found.append(message)
        executor.clear()
        assert_same_state(before, state_of(executor.backbone))
    plain, compiled = found
    assert not executor.problem
    assert set(compiled.files) == set(plain.files)
    assert compiled.score.test["loss"] == pytest.approx(plain.score.test["loss"], rel=1e-3)


def test_a_search_over_bf16_weights_scores_in_bf16_and_keeps_adapters_in_fp32(
    ready: PreparedSearch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loaded_model, "base_dtype", lambda *_: "bfloat16")
    executor = Executor(ready.context())
    frozen = {p.dtype for p in executor.backbone.model.parameters()}
    assert frozen == {torch.bfloat16}
    assert executor.setup.precision == executor.test_precision == "bf16"
    executor.begin([Job("confirm", _candidate(2), _COSTS, 1)])
    (message,) = executor.advance().values()
    assert isinstance(message, ConfirmMessage), message
    for name, content in message.files.items():
        if name.endswith(".safetensors"):
            (tmp_path / "tensors").write_bytes(content)
            kinds = {t.dtype for t in load_file(tmp_path / "tensors").values()}
            assert kinds == {torch.float32}
    monkeypatch.undo()
    whole = Executor(ready.context())
    whole.begin([Job("confirm", _candidate(2), _COSTS, 1)])
    (plain,) = whole.advance().values()
    assert isinstance(plain, ConfirmMessage)
    assert message.score.test["loss"] == pytest.approx(plain.score.test["loss"], rel=0.05)


def test_any_error_of_a_job_is_its_reason_and_the_worker_lives_on(
    executor: Executor, ready: PreparedSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise KeyError("a mistake in a metric of the user's")

    monkeypatch.setattr(executor.setup.task, "summarize", fails)
    executor.begin(_jobs()[:1])
    (message,) = executor.advance().values()
    assert isinstance(message, FailureMessage)
    assert message.reason.startswith("KeyError: ")
    monkeypatch.undo()
    executor.begin(_jobs()[:1])
    assert isinstance(executor.advance()[0], RungMessage)
    executor.clear()


def test_a_lost_device_ends_the_worker(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    executor.begin(_jobs()[:1])
    monkeypatch.setattr(Trainer, "_backward", lose)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        executor.advance()


@pytest.mark.parametrize("n_fit", [4, 1])
def test_a_step_that_does_not_fit_is_computed_in_halves_once(
    executor: Executor, ready: PreparedSearch, monkeypatch: pytest.MonkeyPatch, n_fit: int
) -> None:
    job = Job("search", _candidate(2), _COSTS, 3, 0)
    expected = _alone(executor, job, len(ready.rungs))

    class Small(type(executor.setup.task)):  # type: ignore[misc]
        def row_losses(self, model: torch.nn.Module, batch: Batch) -> Any:
            if batch.split == "train" and len(batch.rows) > n_fit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super().row_losses(model, batch)

    emptied: list[str] = []
    for module in (executor_module, trainer_module):
        monkeypatch.setattr(module, "empty_cache", emptied.append)
    monkeypatch.setattr(executor.setup.task, "__class__", Small)
    if n_fit == 1:
        (failed,) = _alone(executor, job, 1)
        assert isinstance(failed, FailureMessage)
        assert "out of memory" in failed.reason
        assert emptied == ["cpu", "cpu"]
        return
    found = _alone(executor, job, len(ready.rungs))
    assert all(_same(*pair) for pair in zip(found, expected, strict=True))
    assert emptied == ["cpu"]
    assert isinstance(found[-1], RungMessage)
    assert "a step with 8 rows does not fit" in found[-1].warning


def test_a_bad_seed_of_a_finalist_counts(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LossWatch, "add", lambda *_: (0.7, 9.0))
    (searched,) = _alone(executor, Job("search", _candidate(2), _COSTS, 1, 0), 1)
    (confirmed,) = _alone(executor, Job("confirm", _candidate(2), _COSTS, 1), 1)
    assert isinstance(searched, FailureMessage)
    assert "the loss rose from 0.7 to 9" in searched.reason
    assert isinstance(confirmed, ConfirmMessage)


@pytest.fixture
def slow(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """A clock on which each forward pass takes three seconds."""
    clock = FakeClock().replace_in(monkeypatch, step_clock)

    def wait(*_: object) -> None:
        clock.now += 3.0

    executor.backbone.model.register_forward_hook(wait)
    return clock


def test_a_job_is_stopped_between_rungs_when_its_time_is_up(
    executor: Executor, ready: PreparedSearch, slow: FakeClock
) -> None:
    told: list[StepMessage] = []
    executor._on_step = told.append
    first = ready.rungs[0]
    (job,) = _jobs(rates=(1e-2,))
    executor.begin([replace(job, deadline=Deadline(3.0 * first + 60.0))])
    rung = executor.advance()[0]
    assert isinstance(rung, RungMessage)
    assert rung.report.step == first
    message = executor.advance()[0]
    assert isinstance(message, TimeUpMessage)
    assert first < message.step < ready.rungs[1]
    assert message.flops == pytest.approx(_COSTS.train_flops * message.step / _STEPS)
    assert executor.advance() == {}
    assert executor.backbone.attached is None
    steps = [at.step for at in told]
    assert steps == sorted(steps)
    assert (told[0].number, told[0].steps, told[0].job) == (0, _STEPS, job.key)
    assert all(at.steps_per_second == pytest.approx(1 / 3) for at in told)


def test_a_job_whose_time_is_up_before_it_begins_is_not_attached(executor: Executor) -> None:
    (job,) = _jobs(rates=(1e-2,))
    executor.begin([replace(job, deadline=Deadline(-1.0))])
    assert executor.advance() == {0: TimeUpMessage(0, 0.0)}


def test_of_jobs_trained_together_one_is_stopped(
    executor: Executor, ready: PreparedSearch, slow: FakeClock
) -> None:
    jobs = _jobs()
    expected = [_alone(executor, job, 1)[0] for job in jobs]
    executor.begin([jobs[0], replace(jobs[1], deadline=Deadline(50.0)), jobs[2]])
    messages = executor.advance()
    assert executor.trains_together
    stopped = messages.pop(1)
    assert isinstance(stopped, TimeUpMessage)
    assert 0 < stopped.step < ready.rungs[0]
    assert all(_same(messages[i], expected[i]) for i in (0, 2))
    assert sorted(executor.advance()) == [0, 2]
    executor.clear()


def test_no_block_is_computed_for_one_that_has_left(
    executor: Executor, ready: PreparedSearch
) -> None:
    """The others then skip the blocks below their own lowest adapter, and learn the same."""
    low, high = LayerSpec(0, "attn.q", "lora", 2), LayerSpec(1, "attn.q", "lora", 2)
    train = _candidate(1).train
    jobs = [
        Job("search", Candidate(AdapterPlan(specs), train), _COSTS, 3, number)
        for number, specs in enumerate(([low], [high], [high, LayerSpec(1, "mlp.up", "lora", 1)]))
    ]
    expected = [_alone(executor, job, 2) for job in jobs]
    executor.begin(jobs)
    executor.advance()
    together = executor._together
    assert together is not None
    assert together.setup.cache is NO_ACCELERATION
    executor.drop([0])
    assert together.setup.cache is not NO_ACCELERATION
    messages = executor.advance()
    assert sorted(messages) == [1, 2]
    assert all(_same(messages[i], expected[i][1]) for i in (1, 2))
    executor.clear()


def test_a_confirmation_is_stopped_while_it_is_scored(executor: Executor, slow: FakeClock) -> None:
    (job,) = _jobs("confirm", rates=(1e-2,))
    executor.begin([replace(job, deadline=Deadline(3.0 * _STEPS - 1.0))])
    message = executor.advance()[0]
    assert isinstance(message, TimeUpMessage)
    assert message.step == _STEPS


@pytest.mark.parametrize("error", [MultiAdapterError("no"), RuntimeError("out of memory")])
def test_jobs_that_cannot_be_trained_together_train_one_after_another(
    executor: Executor, ready: PreparedSearch, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(_self: MultiTrainer, _to_step: int) -> None:
        raise error

    jobs = _jobs()
    expected = [_alone(executor, job, len(ready.rungs)) for job in jobs]
    monkeypatch.setattr(MultiTrainer, "train_to", refuse)
    executor.begin(jobs)
    for rung in range(len(ready.rungs)):
        if rung:
            messages: Mapping[int, Message] = executor.advance()
        else:
            with pytest.warns(UserWarning, match="no;|out of memory"):
                messages = executor.advance()
        assert all(_same(messages[i], expected[i][rung]) for i in range(3))
    assert not executor.trains_together


def test_training_together_must_be_faster_unless_it_was_asked_for(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autopeft.training.multi_trainer.MAX_TIME_SHARE", 0.0)
    executor.context = replace(
        executor.context, settings=replace(executor.context.settings, trials_per_worker=None)
    )
    executor.begin(_jobs())
    with pytest.warns(UserWarning, match="times as fast as alone"):
        messages = executor.advance()
    assert sorted(messages) == [0, 1, 2]
    assert not executor.trains_together
    monkeypatch.setattr("autopeft.training.multi_trainer.MAX_TIME_SHARE", 1e9)
    executor.trains_together, executor.has_compared = True, False
    executor.begin(_jobs())
    executor.advance()
    assert executor.trains_together
    assert executor.has_compared


def _held() -> int:
    """Bytes of all tensors alive, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.filterwarnings("ignore")
def test_many_trials_leave_nothing_behind(tiny_model: Path, tiny_data: Path) -> None:
    settings = {"steps": 2, "batch_size": 4, "max_length": 16, "precision": "bf16"}
    settings |= {"max_validation_rows": 8, "budget": "9trials"}
    executor = Executor(
        prepare(
            SearchSettings.from_mapping(
                {"model": str(tiny_model), "data": str(tiny_data), **settings}
            )
        ).context()
    )
    before = state_of(executor.backbone)
    train = TrainSettings(1e-3, steps=2, batch_size=4)
    plans = [random_plan(executor.backbone.topology, seed, 0.3) for seed in range(_PLANS)]
    held = {}
    for trial in range(_TRIALS):
        executor.begin([Job("search", Candidate(plans[trial % _PLANS], train), _COSTS, seed=0)])
        message = executor.advance()[0]
        assert isinstance(message, RungMessage), message
        executor.clear()
        if (trial + 1) % _PLANS == 0:
            held[trial + 1] = _held()
    # All plans have been seen once by then, and all caches are full.
    assert held[_TRIALS] == held[2 * _PLANS], held
    assert len(precision._COPIES) < 100
    assert_same_state(before, state_of(executor.backbone))


def test_a_worker_with_another_torch_says_so(ready: PreparedSearch) -> None:
    context = replace(ready.context(), versions={"torch": "1.0.0", "peft": "0.0"})
    executor = Executor(context)
    executor.begin(_jobs()[:1])
    message = executor.advance()[0]
    executor.clear()
    assert isinstance(message, RungMessage)
    assert f"torch {torch.__version__.partition('+')[0]}" in message.warning
    assert "the driver 1.0.0" in message.warning


@pytest.fixture
def registered_costs() -> Iterator[None]:
    with restored(COSTS):
        COSTS.register("n_hooks", Cost("n_hooks", measure=lambda trained: 7.0))
        ticks = count()
        COSTS.register("ticks", Cost("ticks", meter=lambda *_: lambda: float(next(ticks))))
        yield


def test_a_registered_cost_is_measured_once_and_a_meter_in_every_training(
    ready: PreparedSearch, registered_costs: None
) -> None:
    context = ready.context()
    executor = Executor(replace(context, objectives=(context.objectives[0], "n_hooks")))
    job = _jobs("confirm")[0]
    executor.begin([job])
    message = executor.advance()[0]
    assert isinstance(message, ConfirmMessage)
    assert message.score.objectives["n_hooks"] == 7.0
    # It is read before and after the steps, and counts as far as they took the time.
    assert message.score.further == {"ticks": pytest.approx(1.0, abs=0.2)}


def test_trainings_in_one_batch_share_what_a_meter_tells(
    ready: PreparedSearch, registered_costs: None
) -> None:
    executor = Executor(ready.context())
    executor.begin(_jobs())
    for _ in ready.rungs:
        last = executor.advance()
    assert executor.trains_together
    told = [
        message.measured["ticks"] for message in last.values() if isinstance(message, RungMessage)
    ]
    assert len(told) == 3
    assert sum(told) == pytest.approx(len(ready.rungs), abs=0.5)
