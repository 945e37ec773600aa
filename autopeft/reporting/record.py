"""SearchRecord: all results of one search, finished or interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autopeft.confirm.finalists import Finalist
from autopeft.confirm.verdict import Verdict
from autopeft.costs.constraints import Constraint
from autopeft.costs.objectives import Objective
from autopeft.tasks.summary import DataSummary
from autopeft.trial import Trial


@dataclass(frozen=True)
class AdapterScore:
    """The score of a saved adapter, as loading and scoring it reproduces it.

    Attributes:
        seed: Seed of the retraining whose weights were saved.
        split: "test" or "validation".
        metrics: Value by metric name, the quality objective among them.
        n_rows: Number of rows the quality was computed on: for one of text, those generated for.
    """

    seed: int
    split: str
    metrics: Mapping[str, float]
    n_rows: int


@dataclass(frozen=True)
class SearchRecord:
    """All results of one search, as plain values.

    Attributes:
        settings: The settings as resolved, JSON-like values only.
        objectives: Quality first, then costs.
        trials: Every finished trial, by number.
        finalists: Candidates retrained and scored on the test split; empty before confirmation.
        front: Digests of the front of complete trials, on validation numbers.
        baseline: Digest of the tuned LoRA; None if no LoRA baseline completed.
        reference: Digest of the empty plan; None if it was not run.
        pick: Rule that picks the best member of the front, as in the settings.
        adapter_scores: Score of the adapter in `adapters/<digest>`, by digest.
        unsearched: Path inside a block -> share of the blocks' parameters that have no role there;
            also roles of experts that are not in the space.
        versions: Version by package.
        started: ISO 8601 time, as `ended`.
        is_complete: False if the search was interrupted.
        limits: Limits on measured values; a finalist that breaks one is not on the front.
    """

    settings: Mapping[str, Any]
    objectives: tuple[Objective, ...]
    trials: tuple[Trial, ...]
    budget: BudgetReport
    finalists: tuple[Finalist, ...] = ()
    front: tuple[str, ...] = ()
    baseline: str | None = None
    reference: str | None = None
    verdict: Verdict | None = None
    pick: str = "one_se"
    adapter_scores: Mapping[str, AdapterScore] = field(default_factory=dict)
    data: DataSummary = field(default_factory=DataSummary)
    unsearched: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    started: str = ""
    ended: str = ""
    is_complete: bool = True
    limits: tuple[Constraint, ...] = ()


@dataclass(frozen=True)
class BudgetReport:
    """Where the budget went.

    Attributes:
        limit: As the user wrote it.
        spent_seconds: Wall-clock seconds, over all sessions of a resumed search.
        spent_flops: Training FLOPs of search and confirmation, as priced.
        n_trials: Number of trials in any state, baselines included.
        phases: Wall-clock seconds by phase: startup, pricing, search, confirmation, report.
        worker_seconds: Worker seconds by activity: train, evaluate, attach, idle.
    """

    limit: str
    spent_seconds: float
    spent_flops: float
    n_trials: int
    phases: Mapping[str, float]
    worker_seconds: Mapping[str, float]
