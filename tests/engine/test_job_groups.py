"""Packs of jobs on one worker: the messages are those of each job alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from autopeft.engine.executor import Workbench
from autopeft.engine.job_groups import PackRun, groups_to_pack
from autopeft.engine.messages import ConfirmMessage, FailureMessage, Job, Message, RungMessage
from autopeft.errors import MultiAdapterError
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.prepare import PreparedSearch, prepare
from autopeft.settings import SearchSettings
from autopeft.training.multi_trainer import MultiTrainer

_STEPS = 80


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
    }
    return prepare(SearchSettings.from_mapping(settings))


@pytest.fixture
def bench(ready: PreparedSearch) -> Workbench:
    return Workbench(ready.context())


def _candidate(rank: int, rate: float = 1e-2, **train: Any) -> Candidate:
    specs = [LayerSpec(1, "attn.q", "lora", rank), LayerSpec(1, "attn.v", "ia3")]
    settings = {"steps": _STEPS, "batch_size": 8, **train}
    return Candidate(AdapterPlan(specs[: 1 + rank % 2]), TrainSettings(rate, **settings))


def _jobs(kind: Any = "search", rates: tuple[float, ...] = (1e-2, 2e-2, 5e-3)) -> list[Job]:
    return [Job(kind, _candidate(i + 1, rate), 3, i) for i, rate in enumerate(rates)]


def _alone(bench: Workbench, job: Job, n: int) -> list[Message]:
    bench.begin(job)
    messages = [bench.advance() for _ in range(n)]
    bench.clear()
    return messages


def _same(one: Message, other: Message) -> bool:
    if isinstance(one, RungMessage) and isinstance(other, RungMessage):
        return (one.report.step, one.is_last) == (other.report.step, other.is_last) and (
            one.report.loss == pytest.approx(other.report.loss, rel=1e-3)
        )
    return type(one) is type(other)


def test_rungs_are_those_of_each_alone(bench: Workbench, ready: PreparedSearch) -> None:
    jobs = _jobs()
    expected = [_alone(bench, job, len(ready.rungs)) for job in jobs]
    pack = PackRun(bench, jobs)
    for rung in range(len(ready.rungs)):
        messages = pack.advance()
        assert sorted(messages) == [0, 1, 2]
        assert all(_same(messages[i], expected[i][rung]) for i in range(3))
        assert all(m.activity.train > 0 for m in messages.values())
    assert bench.packs
    assert pack.advance() == {}
    assert bench.backbone.attached is None


def test_a_stopped_job_sends_nothing_more(bench: Workbench, ready: PreparedSearch) -> None:
    jobs = _jobs()
    expected = [_alone(bench, job, len(ready.rungs)) for job in jobs]
    pack = PackRun(bench, jobs)
    pack.advance()
    pack.drop([1])
    messages = pack.advance()
    assert sorted(messages) == [0, 2]
    assert all(_same(messages[i], expected[i][1]) for i in messages)
    pack.close()


def test_confirmations_hand_their_adapters_back(bench: Workbench) -> None:
    jobs = [Job("confirm", _candidate(2), seed) for seed in (1, 2, 3)]
    expected = [_alone(bench, job, 1)[0] for job in jobs]
    messages = PackRun(bench, jobs).advance()
    for index, alone in enumerate(expected):
        got = messages[index]
        assert isinstance(got, ConfirmMessage)
        assert isinstance(alone, ConfirmMessage)
        assert got.score.seed == alone.score.seed == index + 1
        assert got.score.test["loss"] == pytest.approx(alone.score.test["loss"], rel=1e-3)
        assert set(got.files) == set(alone.files)
    assert bench.backbone.attached is None


def test_one_fails_and_the_others_go_on(bench: Workbench, ready: PreparedSearch) -> None:
    pack = PackRun(bench, _jobs(rates=(1e-2, 1e30, 5e-3)))
    seen: dict[int, list[Message]] = {0: [], 1: [], 2: []}
    for _ in ready.rungs:
        for index, message in pack.advance().items():
            seen[index].append(message)
    assert [type(m) for m in seen[1]] == [FailureMessage]
    assert [len(seen[i]) for i in (0, 2)] == [len(ready.rungs)] * 2


@pytest.mark.parametrize("error", [MultiAdapterError("no"), RuntimeError("out of memory")])
def test_what_cannot_be_packed_trains_one_after_another(
    bench: Workbench, ready: PreparedSearch, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(_self: MultiTrainer, _to_step: int) -> None:
        raise error

    jobs = _jobs()
    expected = [_alone(bench, job, len(ready.rungs)) for job in jobs]
    monkeypatch.setattr(MultiTrainer, "train_to", refuse)
    pack = PackRun(bench, jobs)
    for rung in range(len(ready.rungs)):
        if rung:
            messages: Mapping[int, Message] = pack.advance()
        else:
            with pytest.warns(UserWarning, match="no;|out of memory"):
                messages = pack.advance()
        assert all(_same(messages[i], expected[i][rung]) for i in range(3))
    assert not bench.packs


def test_a_pack_can_have_to_pay(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopeft.training.multi_trainer.MUST_SAVE", 0.0)
    with pytest.warns(UserWarning, match="times as fast as alone"):
        messages = PackRun(bench, _jobs(), must_pay=True).advance()
    assert sorted(messages) == [0, 1, 2]
    monkeypatch.setattr("autopeft.training.multi_trainer.MUST_SAVE", 1e9)
    bench.packs, bench.has_measured_packs = True, False
    PackRun(bench, _jobs(), must_pay=True).advance()
    assert bench.packs
    assert bench.has_measured_packs


def test_only_like_jobs_go_together() -> None:
    a, b, c, d = (Job("search", _candidate(i), 0, i) for i in (1, 2, 3, 4))
    confirm = Job("confirm", _candidate(1), 1)
    dropping = Job("search", _candidate(5, dropout=0.1), 0, 5)
    bare = Job("search", Candidate(AdapterPlan([]), TrainSettings(1e-2)), 0, 6)
    assert groups_to_pack([a, b, c, d], 3) == [(a, b, c), (d,)]
    assert groups_to_pack([a, confirm, b], 3) == [(a,), (confirm,), (b,)]
    assert groups_to_pack([a, dropping, b], 3) == [(a,), (dropping,), (b,)]
    assert groups_to_pack([bare, a, b], 3) == [(bare,), (a, b)]
    assert groups_to_pack([], 3) == []
    assert groups_to_pack([a, b], 1) == [(a,), (b,)]
