"""What is trained, and what it costs: a task's rows, or a function of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from autopeft.costs import PriceTable
from autopeft.costs.objectives import Objective, default_direction
from autopeft.engine.evaluate import EVALUATORS
from autopeft.errors import SettingsError
from autopeft.models.attention import check_attention
from autopeft.models.backbone import Backbone, build_meta
from autopeft.models.layout import Layout, check_role_map
from autopeft.models.loading import load_config, own_auto_class, position_limit
from autopeft.models.served import as_served
from autopeft.preparing.notes import Note, Phase
from autopeft.preparing.pricing import meta_of, prices_of
from autopeft.preparing.task_data import load_task
from autopeft.preparing.windows import read_window
from autopeft.profiling.measure import price_table
from autopeft.profiling.output_positions import n_logit_weights
from autopeft.searcher.space.config import prompt_sizes
from autopeft.serving.servers import check_servable
from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.tasks.data import TaskData
from autopeft.training.precision import choose_precision
from autopeft.utils.device import is_here
from autopeft.utils.hardware import one_thread


@dataclass(frozen=True)
class Trained:
    """What is trained, and what it costs."""

    quality: Objective
    space: str | Mapping[str, Any]
    prices: PriceTable
    layout: Layout
    data: TaskData | None = None
    task: Task | None = None
    window: str | None = None
    precision: str = "auto"


def read_data(settings: SearchSettings, device: str, note: Note, phase: Phase) -> Trained:
    """Read the data, and price training on them."""
    if settings.direction is not None:
        problem = "is for the metric that `evaluate` returns; metrics of tasks have their own"
        raise SettingsError("direction", settings.direction, problem, "leave it out")
    with phase("startup"):
        data, task = load_task(settings)
        if settings.micro_batch_tokens is not None and not task.can_share_batch:
            problem = f"{task.name} compares all rows of a step, which cannot be split"
            value = settings.micro_batch_tokens
            raise SettingsError("micro_batch_tokens", value, problem, "leave it out")
        read = data.summary()
        note("\n  ".join([read.headline(), *read.lines()]))
    source = task.space if settings.space is None else settings.space
    with phase("pricing"):
        meta = meta_of(settings, data, task)
        _check_servable(settings, meta)
        window = read_window(meta, task, data)
        # Settled here: workers that measured it each for themselves might differ.
        asked = task.auto_precision if settings.precision == "auto" else settings.precision
        if is_here(device):
            with one_thread(device):
                asked = choose_precision(asked, device, meta.model.config)
        settings = replace(settings, precision=asked)
        check_attention(settings.attn_implementation, meta.model, device, asked)
        prices = prices_of(meta, settings, data, task, source, window, device, note)
    return Trained(task.quality, source, prices, meta.layout, data, task, window, asked)


def _check_servable(settings: SearchSettings, meta: Backbone) -> None:
    """Check that the server can load this model, with the head that is trained."""
    if settings.servable is not None:
        check_servable(settings.servable, **as_served(meta))


_UNUSED_BY_FUNCTION = (
    *("data", "task", "text", "text_pair", "label", "prompt", "completion", "columns", "test"),
    *("retain", "retain_rows", "also"),
    *("task_options", "validation", "data_name", "data_revision", "on_long", "generation_rows"),
    *("max_train_rows", "max_validation_rows", "max_test_rows", "rung_rows", "precision"),
    "max_data_gb",
    *("activation_cache", "activation_cache_gb", "trials_per_worker", "compress"),
    *("gradient_checkpointing", "micro_batch_tokens", "packing", "optimizer"),
    "torch_compile",
    "attn_implementation",
)
"""Settings of autopeft's own training, which a function of the user's does not see."""


_FUNCTION_LENGTH = 128
"""Tokens of a row for the costs of a function that says nothing of its rows."""


def read_function(settings: SearchSettings, device: str, note: Note, phase: Phase) -> Trained:
    """Check a training function, and price training the model."""
    name = settings.evaluate
    assert name is not None
    EVALUATORS.check_known("evaluate", name, example="function")
    EVALUATORS.resolve("evaluate", name)
    for each in fields(settings):
        value = getattr(settings, each.name)
        if each.name in _UNUSED_BY_FUNCTION and value != each.default:
            problem = "has no effect beside evaluate, which trains by itself"
            raise SettingsError(each.name, value, problem, "leave it out")
    if not settings.metric:
        problem = "is missing: the name of the quality that evaluate returns"
        raise SettingsError("metric", "", problem, "name it, e.g. metric=accuracy")
    quality = Objective(
        settings.metric,
        settings.direction or default_direction(settings.metric),  # type: ignore[arg-type]
    )
    source = Task.space if settings.space is None else settings.space
    with phase("pricing"):
        config, _ = load_config(settings.model, model_kwargs=None, revision=settings.model_revision)
        auto_class = own_auto_class(config)
        limit = position_limit(config)
        length = settings.max_length or min(_FUNCTION_LENGTH, limit or _FUNCTION_LENGTH)
        if limit is not None and length > limit:
            problem = f"the model has positions for {limit} tokens"
            raise SettingsError("max_length", length, problem, f"use at most {limit}")
        meta = build_meta(
            settings.model,
            auto_class=auto_class,
            revision=settings.model_revision,
            role_map=settings.role_map,
            quantization=settings.quantization,
        )
        check_role_map(meta.model, meta.layout, settings.role_map)
        _check_servable(settings, meta)
        prices = price_table(
            meta,
            batch_size=settings.rows_per_step,
            mean_length=length,
            longest_length=length,
            prompt_sizes=prompt_sizes(source),
            device=device,
        ).as_trained(
            has_activation_cache=False,
            logit_weights=n_logit_weights(meta),
            logit_tokens=float(length * settings.rows_per_step),
        )
    note(
        f"{settings.evaluate} trains {auto_class} and returns {quality.name}, which is "
        f"{quality.direction}d; costs are those of {settings.rows_per_step} rows of "
        f"{length} tokens a step (batch_size, max_length)"
    )
    return Trained(quality, source, prices, meta.layout)
