"""Costs of serving a trained candidate: latency, speed of generation, and loading the adapter.

They are measured as one serves: with the adapter merged where every method of the plan merges and
the weights are not quantized, else attached; in the type of weights, the number of rows and the
lengths of the settings `serving_...`. Over quantized weights, that type is autocast's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteriaList

from autopeft import methods
from autopeft.errors import SettingsError
from autopeft.models.attach import attach, constants
from autopeft.models.attention import attention_in
from autopeft.models.loading import load_config, position_limit
from autopeft.models.merging import cast, merged
from autopeft.models.quantization import NONE
from autopeft.models.saving import fill, save_adapter
from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.tasks.batch import collate
from autopeft.tasks.data import TEXT_INPUTS
from autopeft.training.measuring import Trained
from autopeft.training.precision import seconds_of
from autopeft.utils.device import synchronize
from autopeft.utils.quiet import quiet_transformers
from autopeft.utils.scratch import scratch_folder

_REPEATS = 5
"""Passes of which the median counts, after one that finds kernels."""

_GENERATIONS = 3

_LOADS = 3


def serving_latency_ms(trained: Trained) -> float:
    """Return the median milliseconds of one forward pass as the candidate is served.

    The rows are validation rows, their tokens repeated or cut to `serving_prompt_tokens`; of data
    without tokens, such as images, as they are.
    """
    inputs = _inputs(trained)
    with as_served(trained) as model, torch.inference_mode():
        seconds = [seconds_of(lambda: model(**inputs), trained.device) for _ in range(_REPEATS + 1)]
    return 1000 * statistics.median(seconds[1:])


def tokens_per_second(trained: Trained) -> float:
    """Return the tokens per second of all rows together that are generated after the prompt.

    `serving_new_tokens` of each row, one after another with a cache of keys; the first, which needs
    the pass over the prompt, is not counted.
    """
    inputs, n_new = _inputs(trained), trained.settings.serving_new_tokens
    greedy = {"do_sample": False, "num_beams": 1, "use_cache": True}
    lengths = {"max_new_tokens": n_new, "min_new_tokens": n_new}
    pad = {"pad_token_id": trained.data.pad_id}
    rates = []
    with as_served(trained) as model, torch.inference_mode(), quiet_transformers():
        for _ in range(_GENERATIONS + 1):
            clock = _TokenClock(trained.device)
            stop = StoppingCriteriaList([clock])
            model.generate(**inputs, **greedy, **lengths, **pad, stopping_criteria=stop)
            first, *_, last = clock.times
            n_rows = trained.settings.serving_batch_size
            rates.append(n_rows * (len(clock.times) - 1) / (last - first))
    return statistics.median(rates[1:])


def adapter_load_ms(trained: Trained) -> float:
    """Return the median milliseconds from an adapter's saved folder to the model that has it.

    The base model is loaded already, and the system has read the files before.
    """
    backbone, attached = trained.attached.backbone, trained.attached
    with scratch_folder() as folder:
        save_adapter(attached, folder)
        attached.park()
        try:
            seconds = [_load_seconds(trained, folder) for _ in range(_LOADS)]
        finally:
            if backbone.attached is None:
                attached.unpark()
    return 1000 * statistics.median(seconds)


def _load_seconds(trained: Trained, folder: Path) -> float:
    synchronize(trained.device)
    started = time.perf_counter()
    with attach(trained.attached.backbone, trained.candidate, seed=0) as again:
        fill(again, folder)
        synchronize(trained.device)
        return time.perf_counter() - started


def check_text(settings: SearchSettings, task: Task, device: str) -> None:
    """Check that a model takes prompts of the length of the settings.

    Raises:
        SettingsError: if it does not.
    """
    _check_length(settings, settings.serving_prompt_tokens)


def _check_length(settings: SearchSettings, asked: int) -> None:
    config, _ = load_config(settings.model, model_kwargs=None, revision=settings.model_revision)
    most = position_limit(config)
    if most is not None and asked > most:
        problem = f"with serving_new_tokens, {asked} tokens are more than the model's {most}"
        if asked == settings.serving_prompt_tokens:
            problem = f"is more than the {most} tokens that the model takes"
        value = settings.serving_prompt_tokens
        raise SettingsError("serving_prompt_tokens", value, problem, "use a smaller number")


def check_generates(settings: SearchSettings, task: Task, device: str) -> None:
    """Check that a model generates text token by token, and takes as much.

    Raises:
        SettingsError: if it does not.
    """
    if task.auto_class != "AutoModelForCausalLM":
        problem = f"{task.name} loads {task.auto_class}, which generates nothing"
        remedy = "use serving_latency_ms, or a task for a causal language model"
        raise SettingsError("objectives", "tokens_per_second", problem, remedy)
    _check_length(settings, settings.serving_prompt_tokens + settings.serving_new_tokens)


def is_served_merged(trained: Trained) -> bool:
    """Return whether a candidate is served merged: every method merges, into whole weights."""
    is_whole = trained.attached.backbone.quantization == NONE
    used = trained.candidate.plan.methods
    return is_whole and all(methods.get(name).mergeable for name in used)


@contextmanager
def as_served(trained: Trained) -> Iterator[Any]:
    """Yield the model as it is served; it is as before afterwards, bit for bit."""
    attached = trained.attached
    model: Any = attached.model
    dtype = getattr(torch, trained.settings.serving_dtype)
    was_training = model.training
    model.eval()
    with attention_in("bf16" if dtype.itemsize == 2 else "fp32", model):
        try:
            if attached.backbone.quantization != NONE:
                # What is quantized computes in a type of its own; autocast joins the two.
                kind = torch.device(trained.device).type
                with torch.autocast(kind, dtype, enabled=dtype.itemsize == 2):
                    yield model
            elif is_served_merged(trained):
                with merged(attached), cast(model, dtype):
                    yield model
            else:
                with cast(model, dtype), _constants_cast(trained, dtype):
                    yield model
        finally:
            model.train(was_training)


@contextmanager
def _constants_cast(trained: Trained, dtype: torch.dtype) -> Iterator[None]:
    """Give what adapters hold beside parameters another type; undo it afterwards."""
    layers = [layer for part in trained.attached.parts for layer in part.layers.values()]
    held = [found for layer in layers for found in constants(layer)]
    before = [found for found in held if found[2].is_floating_point()]
    try:
        for values, name, tensor in before:
            values[name] = tensor.to(dtype)
        yield
    finally:
        for values, name, tensor in before:
            values[name] = tensor


def _inputs(trained: Trained) -> dict[str, torch.Tensor]:
    """Return the inputs of the rows that are served."""
    settings, data = trained.settings, trained.data
    split, n_rows = data.validation, settings.serving_batch_size
    rows = np.arange(n_rows) % len(split)
    if not split.has_tokens:
        batch = collate(data, "validation", rows, trained.device)
        return _cast(batch.model_inputs(), settings.serving_dtype)
    columns: dict[str, list[torch.Tensor]] = {}
    for row in rows:
        inputs = collate(data, "validation", np.array([row]), trained.device).model_inputs()
        length = int(inputs["attention_mask"][0].sum())
        places = torch.arange(settings.serving_prompt_tokens, device=trained.device) % length
        for name, tensor in inputs.items():
            # Of a row of several sequences, such as a preference's two answers, the first. What a
            # decoder beside an encoder reads is that of the first row.
            of_row = tensor[:1, places] if name in TEXT_INPUTS else tensor[:1]
            found = columns.setdefault(name, [])
            found.append(of_row if name in TEXT_INPUTS or not found else found[0])
    return {name: torch.cat(found) for name, found in columns.items()}


def _cast(inputs: dict[str, Any], dtype: str) -> dict[str, Any]:
    kind = getattr(torch, dtype)
    return {n: t.to(kind) if t.is_floating_point() else t for n, t in inputs.items()}


class _TokenClock:
    """Notes when each token was there; it never stops."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        synchronize(self._device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
