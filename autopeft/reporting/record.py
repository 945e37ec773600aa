"""RunRecord: everything one search knows when it ends, or when it is interrupted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from autopeft.confirm.finalists import Finalist
from autopeft.confirm.verdict import Verdict
from autopeft.costs.objectives import Objective
from autopeft.trial import Trial


@dataclass(frozen=True)
class AdapterScore:
    """The number a saved adapter gives again when it is loaded and scored.

    Attributes:
        seed: The retraining whose weights were saved.
        split: "test" or "validation".
        metrics: Value by metric name, the quality objective among them.
        n_rows: Rows it was scored on.
    """

    seed: int
    split: str
    metrics: Mapping[str, float]
    n_rows: int

    def to_json(self) -> dict[str, Any]:
        """`{"split", "seed", "n_rows", <metric>: <value>, ...}`."""
        return {"split": self.split, "seed": self.seed, "n_rows": self.n_rows, **self.metrics}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> AdapterScore:
        """The score that `to_json` wrote."""
        metrics = {k: v for k, v in row.items() if k not in ("split", "seed", "n_rows")}
        return cls(row["seed"], row["split"], metrics, row["n_rows"])


@dataclass(frozen=True)
class DataSummary:
    """What the search was given to learn from.

    Attributes:
        rows: Rows by split: train, validation, test.
        dropped_rows: Rows left out because text or label was empty.
        labels: Class names in index order; empty where the task has none.
        fingerprint: Digest of the rows, so that two runs can be told to have seen the same data.
    """

    rows: Mapping[str, int] = field(default_factory=dict)
    dropped_rows: int = 0
    labels: tuple[str, ...] = ()
    fingerprint: str = ""

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return {
            "rows": dict(self.rows),
            "dropped_rows": self.dropped_rows,
            "labels": list(self.labels),
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> DataSummary:
        """The summary that `to_json` wrote."""
        return cls(row["rows"], row["dropped_rows"], tuple(row["labels"]), row["fingerprint"])


@dataclass(frozen=True)
class RunRecord:
    """One search, finished or interrupted, as plain values.

    Attributes:
        settings: The settings as resolved, JSON-like values only.
        objectives: Quality first, then costs; fronts are drawn over the first cost.
        trials: Every finished trial, in the order of their numbers.
        finalists: Candidates retrained and scored on the test split; empty before confirmation.
        front: Candidate digests of the search's own front (complete trials, validation numbers).
        best: Candidate digest of the pick, or None where nothing completed.
        baseline: Candidate digest of the tuned LoRA, chosen on validation; None if none completed.
        reference: Candidate digest of the empty plan, or None if it was not run.
        verdict: None before confirmation.
        budget: Where the budget went.
        adapter_scores: Candidate digest -> score of the adapter saved in `adapters/<digest>`.
        data: What was learned from.
        versions: Version by package: autopeft, torch, transformers, peft, optuna, ray, python.
        warnings: What the user should know, one line each.
        started: ISO 8601 time.
        ended: ISO 8601 time.
        is_complete: False if the search was interrupted before its confirmation ended.
    """

    settings: Mapping[str, Any]
    objectives: tuple[Objective, ...]
    trials: tuple[Trial, ...]
    budget: BudgetReport
    finalists: tuple[Finalist, ...] = ()
    front: tuple[str, ...] = ()
    best: str | None = None
    baseline: str | None = None
    reference: str | None = None
    verdict: Verdict | None = None
    adapter_scores: Mapping[str, AdapterScore] = field(default_factory=dict)
    data: DataSummary = field(default_factory=DataSummary)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    started: str = ""
    ended: str = ""
    is_complete: bool = True

    @property
    def quality(self) -> Objective:
        """The quality objective."""
        return self.objectives[0]

    @property
    def costs(self) -> tuple[Objective, ...]:
        """The cost objectives, in the user's order."""
        return self.objectives[1:]

    def trial_counts(self) -> dict[str, int]:
        """Number of trials by state: complete, pruned, failed."""
        counts = Counter(trial.state for trial in self.trials)
        return {
            "complete": counts["complete"],
            "pruned": counts["pruned"],
            "failed": counts["failed"],
        }


@dataclass(frozen=True)
class BudgetReport:
    """Where the budget went. Seconds are of the wall clock unless named otherwise.

    Attributes:
        limit: As the user wrote it.
        spent_seconds: Wall-clock seconds, earlier sittings of a resumed run included.
        spent_flops: Training FLOPs, as priced, search and confirmation together.
        n_trials: Trials of the search (baselines included), whatever their state.
        phases: Wall-clock seconds by phase: startup, pricing, search, confirmation, report.
        worker_seconds: Worker seconds by activity: train, evaluate, attach, idle.
    """

    limit: str
    spent_seconds: float
    spent_flops: float
    n_trials: int
    phases: Mapping[str, float]
    worker_seconds: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return asdict(self)
