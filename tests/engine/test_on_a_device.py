"""A worker's whole life on an accelerator that is pretended, for each task."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from covering import usual_first
from pretended_device import NAME, pretended
from task_rows import DATA

from autopeft.costs import Price
from autopeft.engine.executor import Executor
from autopeft.engine.messages import ConfirmMessage, Job, Message, RungMessage, WorkerContext
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.preparing.task_data import load_task
from autopeft.saved_inputs import saved_inputs
from autopeft.settings import SearchSettings
from autopeft.tasks.reading import read
from autopeft.tasks.registry import TASKS
from autopeft.testing.tiny_models import save_model

STEPS, ROWS = 10, 4
COSTS = Price(1, 4, 1.0, 1)


def _messages(
    task: str, device: str, folder: Path, *, lanes: int = 1, **more: Any
) -> list[Message]:
    """What a worker sends: a search's job in bf16, with the cache, then its confirmation.

    It trains the job in several lanes.
    """
    rows, settings = DATA[task]
    cells = [list(table.columns.values()) for table in read("data", rows).values()]
    model = save_model(TASKS[task].auto_class, cells, folder / "tiny")
    given = {"model": str(model), "data": rows, "task": task, "precision": "bf16", **settings}
    with saved_inputs({**given, **more}, folder) as plain:
        asked = SearchSettings.from_mapping(plain)
        data, found = load_task(asked)
        names = (found.quality.name, "latency_ms")
        cache = str(folder / "cache")
        context = WorkerContext(asked, data, (STEPS,), names, device, cache_folder=cache)
        executor = Executor(context)
        topology = executor.backbone.topology
        last = topology.n_layers - 1
        layers = range(last + 1) if lanes > 1 else (last,)
        specs = [LayerSpec(n, role, "lora", 2) for n in layers for role in ("attn.q", "mlp.down")]
        train = TrainSettings(1e-3, steps=STEPS, batch_size=ROWS)
        candidate = Candidate(AdapterPlan(specs), train)
        sent: list[Message] = []
        for job in (Job("search", candidate, COSTS, 0, 0), Job("confirm", candidate, COSTS, 0)):
            executor.begin([job] * lanes)
            sent.append(executor.advance()[0])
            assert executor.trains_together == (lanes > 1 or not asked.trains_alone)
            executor.clear()
    return sent


def _check_equal(here: list[Message], there: list[Message]) -> None:
    for messages in (here, there):
        assert [type(message) for message in messages] == [RungMessage, ConfirmMessage]
    for one, other in zip(here, there, strict=True):
        if isinstance(one, RungMessage) and isinstance(other, RungMessage):
            assert other.report.loss == pytest.approx(one.report.loss, rel=0.01)
        if isinstance(one, ConfirmMessage) and isinstance(other, ConfirmMessage):
            assert other.files.keys() == one.files.keys()
            assert other.score.test["loss"] == pytest.approx(one.score.test["loss"], rel=0.01)


@pytest.mark.parametrize("task", usual_first(list(DATA), "token-classification", "sft"))
def test_a_worker_does_on_a_device_what_it_does_on_the_host(task: str, tmp_path: Path) -> None:
    metric: dict[str, Any] = {"metric": "exact_match"} if task in ("sft", "seq2seq") else {}
    here = _messages(task, "cpu", tmp_path / "here", **metric)
    with pretended():
        there = _messages(task, NAME, tmp_path / "there", **metric)
    _check_equal(here, there)


@pytest.mark.parametrize(
    ("task", "lanes", "more"),
    [
        ("sft", 1, {}),
        ("sft", 1, {"gradient_checkpointing": True, "micro_batch_tokens": 20}),
        ("sft", 1, {"packing": True}),
        ("sft", 2, {"trials_per_worker": 2}),
        ("text-classification", 1, {}),
    ],
    ids=["sft", "checkpointing", "packing", "lanes", "text-classification"],
)
def test_a_worker_does_on_two_devices_what_it_does_on_the_host(
    task: str, lanes: int, more: dict[str, Any], tmp_path: Path
) -> None:
    if task == "sft":
        more = {**more, "metric": "exact_match"}
    here = _messages(task, "cpu", tmp_path / "here", lanes=lanes, **more)
    with warnings.catch_warnings(), pretended(2) as world:
        warnings.filterwarnings("error", message=".* is off: ")
        there = _messages(task, NAME, tmp_path / "there", lanes=lanes, gpus_per_worker=2, **more)
        assert world.crossings > 0
    _check_equal(here, there)
