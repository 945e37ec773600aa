"""Jobs that can be trained together are grouped, in their order."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

from autopeft.costs import Price, PriceTable, Topology
from autopeft.engine.job_queue import JobQueue
from autopeft.engine.messages import Job, WorkerContext
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.settings import SearchSettings

_FREE = Price(0, 0, 0.0, 0)


def _job(number: int, kind: Literal["search", "confirm"] = "search", **train: Any) -> Job:
    plan = AdapterPlan([LayerSpec(1, "attn.q", "lora", number)] if number else [])
    return Job(kind, Candidate(plan, TrainSettings(1e-2, **train)), _FREE, 0, number)


def _groups(jobs: list[Job], size: int, **more: Any) -> list[tuple[Job, ...]]:
    left = iter(jobs)
    dispatcher: Any = SimpleNamespace(next_job=lambda: next(left, None))
    settings = SearchSettings(model="m", data="d")
    context = WorkerContext(settings, None, (), (), "cpu", trials_per_worker=size, **more)
    return list(iter(JobQueue(dispatcher, context).next_group, ()))


def test_only_like_neighbors_go_together() -> None:
    a, b, c, d = (_job(number) for number in (1, 2, 3, 4))
    confirm, dropping, bare = _job(1, "confirm"), _job(5, dropout=0.1), _job(0)
    assert _groups([a, b, c, d], 3) == [(a, b, c), (d,)]
    assert _groups([a, confirm, b], 3) == [(a,), (confirm,), (b,)]
    assert _groups([a, dropping, b], 3) == [(a,), (dropping,), (b,)]
    alone = replace(b, is_alone=True)
    assert _groups([a, alone, c], 3) == [(a,), (alone,), (c,)]
    assert _groups([bare, a, b], 3) == [(bare,), (a, b)]
    assert _groups([a, _job(2, steps=7), b], 3) == [(a,), (_job(2, steps=7),), (b,)]
    assert _groups([], 3) == []
    assert _groups([a, b], 1) == [(a,), (b,)]


def test_no_more_go_together_than_fit_into_memory() -> None:
    table = PriceTable.from_topology(Topology(2, {"attn.q": (64, 64)}), longest_tokens_per_step=512)
    jobs = [_job(rank) for rank in (4, 8, 4, 32, 4)]
    candidates = [job.candidate for job in jobs]
    assert table.pack_bytes(candidates[:2]) < table.pack_bytes(candidates[:3])

    def sizes(room: float | None) -> list[int]:
        return [len(group) for group in _groups(jobs, 4, prices=table, room=room)]

    assert sizes(None) == sizes(1e12) == [4, 1]
    assert sizes(table.pack_bytes(candidates[:3])) == [3, 2]
    assert sizes(table.pack_bytes(candidates[:2])) == [2, 1, 1, 1]
    # A constraint refuses what does not fit alone; what is left is trained.
    assert sizes(1.0) == [1] * 5
