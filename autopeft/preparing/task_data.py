"""Reads the rows of a search, and checks that its model can take them."""

from __future__ import annotations

from typing import Any

import numpy as np

from autopeft.errors import DataError, ModelError, SettingsError, UserError
from autopeft.models.loading import embedding_rows, load_config
from autopeft.preparing.paths import expand
from autopeft.profiling.causality import sees_later_tokens
from autopeft.profiling.end_tokens import takes_end_tokens
from autopeft.profiling.packing import keeps_rows_apart
from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.tasks.batch import collate
from autopeft.tasks.data import TaskData
from autopeft.tasks.load_data import load_data, read_tables
from autopeft.tasks.registry import make_task
from autopeft.tasks.retained import load_retained
from autopeft.tasks.second_tasks import load_also


def load_task(settings: SearchSettings) -> tuple[TaskData, Task]:
    """Return the encoded data of a search, and the task bound to them."""
    if settings.evaluate is not None:
        problem = "trains by itself, so autopeft reads no rows"
        raise SettingsError("evaluate", settings.evaluate, problem, "leave it out, and name data")
    tables = read_tables(settings)
    config, _ = load_config(settings.model, model_kwargs=None, revision=settings.model_revision)
    task = make_task(settings, tables["train"], config)
    if task.is_autoregressive and sees_later_tokens(config, task.auto_class):
        raise ModelError(
            "model",
            settings.model,
            f"sees later tokens, so {task.name} would learn nothing: it reads the answer",
            "use a decoder, or another --task",
        )
    if settings.packing and not (task.can_pack and keeps_rows_apart(config, task.auto_class)):
        who = f"{config.model_type} does not keep packed rows apart"
        problem = who if task.can_pack else f"{task.name} takes each row in a sequence of its own"
        raise SettingsError("packing", True, problem, "leave it out")
    processor = task.processor = task.load_processor(settings.model, settings.model_revision)
    data = load_data(settings, task, processor, tables, model_limit=task.length_limit())
    check_token_ids(settings.model, data, processor, embedding_rows(config))
    check_end_tokens(settings.model, data, config, task.auto_class)
    task = task.bound(data)
    task.check_metrics(data)
    data = load_retained(settings, task, processor, data, tables.values())
    data = load_also(settings, task, data, tables.values(), config)
    for second in data.second:
        check_token_ids(settings.model, second.data, processor, embedding_rows(config))
        check_end_tokens(settings.model, second.data, config, task.auto_class)
    return data, task


def check_token_ids(model: str, data: TaskData, tokenizer: Any, n_rows: int | None) -> None:
    """Check that the model's input embedding has a row for each token of the data.

    Args:
        model: Folder or hub id of the model.
        data: The encoded data.
        tokenizer: What encoded it: a tokenizer, or a processor that has one.
        n_rows: Rows of the embedding; None: it has none, or they are unknown.

    Raises:
        ModelError: if it lacks one: tokenizer and model do not belong together.
    """
    splits = data.splits.values()
    tokens = [split.tokens for split in splits if split.has_tokens]
    tokens += [split.ragged["labels"].values for split in splits if "labels" in split.ragged]
    if n_rows is None or not tokens:
        return
    largest = max(data.pad_id, *(int(ids.max()) for ids in tokens))
    if largest >= n_rows:
        word = getattr(tokenizer, "tokenizer", tokenizer).convert_ids_to_tokens(largest)
        raise ModelError(
            "model",
            model,
            f"its tokenizer has the token {largest} ({word}), its embedding has {n_rows} rows: "
            "they do not belong together",
            "save the model's own tokenizer beside it, or call "
            "model.resize_token_embeddings(len(tokenizer)) and save the model",
        )


def check_end_tokens(model: str, data: TaskData, config: Any, auto_class: str) -> None:
    """Check that a model that classifies a text by its end token finds it in each row.

    Args:
        model: Folder or hub id of the model.
        data: The encoded data.
        config: The model's configuration, from transformers.
        auto_class: Name of the class of transformers that loads it.

    Raises:
        ModelError: if the tokenizer adds none.
        DataError: if a row has more or fewer of them than the others.
    """
    end = getattr(config, "eos_token_id", None)
    splits = [split for split in data.splits.values() if split.has_tokens]
    if not getattr(config, "is_encoder_decoder", False) or not isinstance(end, int) or not splits:
        return
    found = [np.append(0, np.cumsum(split.tokens == end))[split.offsets] for split in splits]
    counts = [np.diff(ends) for ends in found]
    numbers, rows = np.unique(np.concatenate(counts), return_counts=True)
    usual = int(numbers[rows.argmax()])
    if len(numbers) == 1 and usual > 0:
        return
    if takes_end_tokens(config, auto_class, numbers.tolist()) is not False:
        return
    kind = f"is {config.model_type}, which classifies a text at its end token ({end})"
    if usual == 0:
        raise ModelError(
            "model",
            model,
            f"{kind}, but its tokenizer adds none",
            "save the model's own tokenizer beside it, one that ends each text with that token",
        )
    for split, of_rows in zip(splits, counts, strict=True):
        for row in np.flatnonzero(of_rows != usual)[:1]:
            number = int(split.source_rows[row // split.sequences_per_row]) + 1
            raise DataError(
                "data",
                split.source,
                f"row {number} has {of_rows[row]} end tokens, most rows {usual}; the model {kind} "
                "and takes rows with equally many only",
                "take the end token out of the text, or use an encoder",
            )


def validation_rows(settings: SearchSettings, n_rows: int = 32) -> dict[str, Any] | None:
    """Return the first validation rows of a search as model inputs; None if its data is gone."""
    settings = expand(settings)
    if settings.evaluate is not None:
        return None
    try:
        data, _ = load_task(settings)
    except UserError:
        return None
    n = min(n_rows, len(data.validation))
    return collate(data, "validation", np.arange(n, dtype=np.int64)).model_inputs()
