"""Checks a task: its rows, its encoding, its loss, its scores."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autopeft.engine.loaded_model import LoadedModel
from autopeft.engine.messages import WorkerContext
from autopeft.models.attach import Attached, attach
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.preparing.task_data import load_task
from autopeft.saved_inputs import saved_inputs
from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.tasks.batch import collate
from autopeft.tasks.data import TaskData
from autopeft.tasks.load_data import read_tables
from autopeft.tasks.preview import preview_of
from autopeft.tasks.reading import Table, read
from autopeft.tasks.registry import TASKS
from autopeft.testing.requirement import Requirement, registered
from autopeft.testing.tiny_models import save_model
from autopeft.training.batching import training_batches
from autopeft.training.evaluation import evaluate
from autopeft.training.setup import TrainingSetup

_ROLES = ("attn.q", "attn.v", "attn.qkv")
_STEPS, _ROWS = 30, 8


def check_task(task: Any, data: Any, *, model: str | Path | None = None, **settings: Any) -> None:
    """Check that a task keeps the contract of `autopeft.Task` on some data.

    Every row is encoded or counted as dropped, also an incomplete one; encoding and scores are the
    same each time and do not depend on the other rows; the loss is that of its rows, its gradient
    reaches an adapter, and training lowers it; every metric is measured; the task can be sent to a
    worker.

    Args:
        task: The task, its class, or its name.
        data: Some 40 rows or more, as `autopeft.search` takes them, a list of dicts for example.
        model: Folder of a model; None: a tiny one is made, for tasks that read text.
        settings: Further settings of the search, such as `columns` or `max_length`.

    Raises:
        AssertionError: if it does not; the message is one line.
        UserError: if it is no task, or the data cannot be read at all.

    Example:
        >>> from autopeft.testing import check_task
        >>> words = ["good", "bad"] * 20
        >>> rows = [{"text": f"a {w} film {n}", "label": w} for n, w in enumerate(words)]
        >>> check_task("text-classification", rows)
    """
    part = TASKS.resolve("task", task)
    require = Requirement(f"task {part.name}")
    require.pickled(part)
    with (
        registered(TASKS, part.name, part),
        tempfile.TemporaryDirectory(prefix="autopeft-") as folder,
    ):
        where = model or _tiny_model(part, data, Path(folder) / "tiny")
        given = {"model": str(where), "data": data, "task": part.name, **settings}
        with saved_inputs(given, Path(folder)) as plain:
            asked = SearchSettings.from_mapping(plain)
            _check(asked, require)


def _tiny_model(task: Task, data: Any, folder: Path) -> Path:
    """Save a tiny model that knows the words of the data."""
    cells = [list(table.columns.values()) for table in read("data", data).values()]
    return save_model(task.auto_class, cells, folder)


def _check(settings: SearchSettings, require: Requirement) -> None:
    encoded, task = load_task(settings)
    _check_rows(task, encoded, read_tables(settings)["train"], require)
    with require.no_error("`autopeft preview`"):
        preview_of(encoded, task, 2)
    context = WorkerContext(
        replace(settings, activation_cache=False, precision="fp32"),
        encoded,
        rungs=(1,),
        objectives=(task.quality.name, "trainable_params"),
        device="cpu",
    )
    with require.no_error("loading the model in a worker"):
        loaded = LoadedModel(context)
    topology = loaded.backbone.topology
    specs = [
        LayerSpec(layer, role, "lora", 2)
        for layer in range(topology.n_layers)
        for role in topology.roles(layer)
        if role in _ROLES
    ]
    candidate = Candidate(AdapterPlan(specs), TrainSettings(1e-2, steps=_STEPS, batch_size=_ROWS))
    with attach(loaded.backbone, candidate, seed=0) as attached:
        _check_scores(attached, loaded.setup, require)
        _check_loss(attached, loaded.setup, require)


def _check_rows(task: Task, data: TaskData, table: Table, require: Requirement) -> None:
    """Check that no row disappears without being counted."""
    rows = task.clean(table)
    n_dropped = sum(rows.dropped.values())
    text = f"clean keeps {len(rows)} and drops {n_dropped} of {table.n_rows} rows; count the others"
    require.that(len(rows) + n_dropped == table.n_rows, text)
    names = task.find_columns(task.settings.column_names(), table)
    for column in task.columns:
        if not column.is_required or column.role not in names:
            continue
        missing = {
            k: [*v, None if k == names[column.role] else v[0]] for k, v in table.columns.items()
        }
        with require.no_error(f"cleaning a row without {column.role}"):
            less = task.clean(replace(table, columns=missing))
        is_counted = sum(less.dropped.values()) == n_dropped + 1 and len(less) == len(rows)
        text = f"a row without {column.role} is not dropped and counted by clean"
        require.that(is_counted, text)
    labels = data.labels
    first, again = (task.encode(task.processor, rows, labels, data.max_length) for _ in range(2))
    n_dropped = sum(first.dropped.values())
    text = f"encode keeps {len(first)} and drops {n_dropped} of {len(rows)} rows; count the others"
    require.that(len(first) + n_dropped == len(rows), text)
    require.that(
        set(first.source_rows.tolist()) <= set(rows.source_rows.tolist()),
        "encode returns source_rows that it was not given",
    )
    if first.has_tokens:
        longest = int(first.lengths.max())
        text = f"encode returns {longest} tokens, but max_length is {data.max_length}"
        require.that(longest <= data.max_length, text)
    arrays = [{**e.row_arrays, **e.token_arrays, "tokens": e.tokens} for e in (first, again)]
    is_same = all(np.array_equal(array, arrays[1][name]) for name, array in arrays[0].items())
    require.that(is_same, "encode returns other values the second time")


def _check_loss(attached: Attached, setup: TrainingSetup, require: Requirement) -> None:
    """Check the loss of a batch and its gradient, and that training lowers it."""
    task, data, model = setup.task, setup.data, attached.model
    chosen = next(iter(training_batches(data.train.lengths, _ROWS, seed=0)))
    batch = collate(data, "train", chosen)
    with require.no_error("computing the loss"):
        loss = task.loss(model, batch)
    require.that(loss.shape == () and loss.dtype == torch.float32, "loss is no float32 scalar")
    before = float(loss.detach())
    require.that(np.isfinite(before), f"loss is {before}")
    with require.no_error("computing the loss of parts of a batch"):
        parts = task.losses(model, batch, 2 if task.can_share_batch else 1)
    half = len(chosen) // 2
    if task.can_share_batch:
        alone = [
            task.loss(model, collate(data, "train", c)) for c in (chosen[:half], chosen[half:])
        ]
        text = "the loss of a row depends on the batch; set can_share_batch=False"
    else:
        alone, text = [loss], "losses of the whole batch differ from loss"
    is_same = torch.allclose(parts, torch.stack(alone), rtol=1e-3, atol=1e-4)
    require.that(is_same, f"{text} ({_shown(parts)} and {_shown(torch.stack(alone))})")
    optimizer = torch.optim.AdamW(
        [{"params": list(group.parameters), "lr": 1e-2} for group in attached.parameter_groups()]
    )
    model.train()
    for _ in range(_STEPS):
        optimizer.zero_grad()
        with require.no_error("the backward pass of the loss"):
            task.loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for group in attached.parameter_groups():
        moved = [p for p in group.parameters if p.grad is not None and bool((p.grad != 0).any())]
        require.that(bool(moved), f"no gradient of the loss reaches the {group.method}")
    model.eval()
    with torch.no_grad():
        trained = float(task.loss(model, batch).detach())
    text = f"{_STEPS} steps on one batch change the loss from {before:.4g} to {trained:.4g}"
    require.that(trained < before, f"{text}, which must fall")


def _check_scores(attached: Attached, setup: TrainingSetup, require: Requirement) -> None:
    """Check what an evaluation returns, and that rows are scored alone."""
    task, data, model = setup.task, setup.data, attached.model
    rows = np.arange(len(data.validation), dtype=np.int64)
    batch = collate(data, "validation", rows)
    with torch.inference_mode(), require.no_error("score"):
        scores = task.score(model, batch)
    _check_row_scores(scores, len(rows), require)
    if task.can_share_batch:  # Else a row's loss is that of its batch, and scores may be anything.
        with torch.no_grad(), require.no_error("row_losses"):
            losses = torch.stack(task.row_losses(model, batch)).float()
        told = torch.stack((scores["loss"].float(), scores["weight"].float()))
        text = "score and row_losses return different losses or weights"
        require.that(torch.allclose(losses, told, rtol=1e-3, atol=1e-4), text)
    with require.no_error("scoring the validation rows"):
        found = evaluate(model, setup, "validation")
        again = evaluate(model, setup, "validation")
        turned = evaluate(model, setup, "validation", rows=rows[::-1].copy())
    missing = {metric.name for metric in task.measured} - set(found.metrics)
    require.that(not missing, f"an evaluation lacks {', '.join(sorted(missing))}")
    quality = found.metrics[task.quality.name]
    require.that(bool(np.isfinite(quality)), f"{task.quality.name} is {quality}")
    text = f"an evaluation has {len(found.rows)} row qualities for {len(rows)} rows"
    require.that(len(found.rows) == len(rows), text)
    require.that(
        np.array_equal(found.rows, again.rows) and dict(found.metrics) == dict(again.metrics),
        "a second evaluation of the same model differs",
    )
    if task.can_share_batch:
        text = "the scores of a row depend on the order of the rows"
        require.that(np.allclose(turned.rows[::-1], found.rows, rtol=1e-3, atol=1e-4), text)


def _check_row_scores(
    scores: Mapping[str, torch.Tensor], n_rows: int, require: Requirement
) -> None:
    for name in ("loss", "weight"):
        require.that(name in scores, f"score returns no {name!r}")
    for name, values in scores.items():
        text = f"score returns {name} of shape {tuple(values.shape)} for {n_rows} rows"
        require.that(len(values.shape) > 0 and values.shape[0] == n_rows, text)


def _shown(values: torch.Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in islice(values.tolist(), 4))
