"""What the user asked for: one frozen dataclass, whose field notes become the command line's help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from autopeft.errors import SettingsError


def _note(text: str, default: Any = None, group: str = "Search") -> Any:
    return field(default=default, metadata={"help": text, "group": group})


@dataclass(frozen=True)
class SearchSettings:
    """Everything `autopeft search` can be told. YAML keys, flags and keywords share these names."""

    model: str = _note("Folder or hub id of the pretrained model.", "", "Model and data")
    data: str = _note("CSV, JSONL or Parquet file, or hub id of a data set.", "", "Model and data")
    task: str = _note("text-classification or causal-lm.", "text-classification", "Model and data")
    text: str = _note("Column with the text.", "text", "Model and data")
    text_pair: str | None = _note("Column with the second text of a pair.", None, "Model and data")
    label: str = _note("Column with the label.", "label", "Model and data")
    prompt: str = _note("Column with the prompt (causal-lm); no loss on it.", "prompt", "Model and data")
    completion: str = _note("Column with the completion (causal-lm).", "completion", "Model and data")
    validation: str | None = _note(
        "File or split name to validate on; else split off the training data.", None, "Model and data"
    )
    test: str | None = _note(
        "File or split name to test on; else split off the training data.", None, "Model and data"
    )
    data_name: str | None = _note("Subset name of a hub data set.", None, "Model and data")
    model_revision: str | None = _note("Revision of a hub model.", None, "Model and data")
    data_revision: str | None = _note("Revision of a hub data set.", None, "Model and data")
    max_length: int = _note("Longest row, in tokens; longer ones are cut.", 128, "Model and data")
    max_train_rows: int | None = _note("Use at most so many training rows.", None, "Model and data")
    max_validation_rows: int | None = _note("Validate on at most so many rows.", 1000, "Model and data")
    max_test_rows: int | None = _note("Test on at most so many rows.", None, "Model and data")

    space: str | Mapping[str, Any] = _note("Name or file of a search space.", "default", "Search")
    metric: str | None = _note("Quality to search for; default: the task's own.", None, "Search")
    objectives: tuple[str, ...] = _note(
        "Costs to trade against quality: trainable_params, adapter_bytes, train_flops, "
        "peak_memory_bytes, train_seconds, latency_ms.",
        ("trainable_params",),
        "Search",
    )
    constraints: tuple[str, ...] = _note("Limits such as trainable_params<=200k (or 0.1%).", (), "Search")
    sampler: str = _note("autopeft, tpe, nsga2, gp or random.", "autopeft", "Search")
    pruner: str = _note("gap, none, median, asha or another Optuna pruner by name.", "gap", "Search")
    pick: str = _note("How best is picked: one_se, knee or best_quality.", "one_se", "Search")
    seed: int = _note("Seeds the search, the splits and the trainings.", 0, "Search")

    budget: str = _note("What may be spent: 30m, 2h, 50trials, 3e15flops, or several.", "30m", "Budget")
    confirm_share: float = _note("Share of the budget kept for confirmation.", 0.3, "Budget")
    confirm_seeds: int = _note("Seeds each finalist is retrained with.", 3, "Budget")
    max_finalists: int = _note("Front members to confirm, at most.", 6, "Budget")

    steps: int = _note("Optimiser steps of a full trial.", 100, "Training")
    batch_size: int = _note("Rows per optimiser step.", 16, "Training")
    eta: int = _note("Ratio between rungs.", 3, "Training")
    rungs: int = _note("How many times a trial reports, the end included.", 3, "Training")
    precision: str = _note("auto, fp32 or bf16.", "auto", "Training")

    workers: int | None = _note("Parallel trials; default: one a core or GPU.", None, "Machine")
    gpus_per_worker: float | None = _note("GPU share of a worker, e.g. 0.25.", None, "Machine")
    ray_address: str | None = _note("Address of a Ray cluster to join.", None, "Machine")

    output: str = _note("Folder for the results; must not hold another search.", "", "Output")
    storage: str | None = _note(
        "Optuna storage: a URL, or a path ending in .log for a journal file; "
        "default: study.db in the output folder.",
        None,
        "Output",
    )
    study_name: str | None = _note("Name in the storage; default: the output folder's.", None, "Output")

    @classmethod
    def from_mapping(cls, row: Mapping[str, Any]) -> SearchSettings:
        """Settings from YAML keys or keywords.

        Raises:
            SettingsError: if a key is unknown.
        """
        known = {f.name for f in fields(cls)}
        for key in row:
            if key not in known:
                raise SettingsError(key, row[key], "no such setting", f"use one of {sorted(known)}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
