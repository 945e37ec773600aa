"""What comes back from training: objectives, rung reports, outcomes, finalists, the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from autopeft.errors import SettingsError
from autopeft.plan import Candidate
from autopeft.pricing import Price

Direction = Literal["maximize", "minimize"]
State = Literal["complete", "pruned", "failed"]


@dataclass(frozen=True)
class Objective:
    """One thing to optimise.

    Attributes:
        name: As written in `front.json`.
        direction: "maximize" or "minimize".
        unit: For people; empty for a pure number.
        is_known: True if the value is known before training, from the price.
    """

    name: str
    direction: Direction
    unit: str = ""
    is_known: bool = False

    def to_json(self) -> dict[str, str]:
        """`{"name", "direction", "unit"}`."""
        return {"name": self.name, "direction": self.direction, "unit": self.unit}

    def sign(self) -> float:
        """+1 where larger is better, -1 where smaller is."""
        return 1.0 if self.direction == "maximize" else -1.0


COSTS: Mapping[str, Objective] = {
    o.name: o
    for o in (
        Objective("trainable_params", "minimize", "parameters", is_known=True),
        Objective("adapter_bytes", "minimize", "bytes", is_known=True),
        Objective("train_flops", "minimize", "FLOPs", is_known=True),
        Objective("peak_memory_bytes", "minimize", "bytes", is_known=True),
        Objective("train_seconds", "minimize", "seconds"),
        Objective("latency_ms", "minimize", "ms"),
    )
}
"""Every efficiency objective."""

_MINIMISED_QUALITIES = frozenset({"loss", "perplexity"})


def objective(name: str) -> Objective:
    """The objective of that name: a cost from `COSTS`, else a quality metric.

    A quality is maximised, except "loss" and "perplexity".

    Raises:
        SettingsError: if the name is empty.
    """
    if not name:
        raise SettingsError("objectives", name, "an objective needs a name", "use e.g. accuracy")
    if name in COSTS:
        return COSTS[name]
    return Objective(name, "minimize" if name in _MINIMISED_QUALITIES else "maximize")


@dataclass(frozen=True)
class RungReport:
    """What a trial says at a rung.

    Attributes:
        step: Optimiser steps done.
        score: The pruning signal, in the direction of the quality objective. Validation loss tells
            more than a metric on few rows, so for a maximised metric this is minus the loss.
        loss: Validation loss.
        metrics: Validation metrics by name, the quality objective among them.
        seconds: Training seconds so far, evaluation not counted.
        evaluation_seconds: Evaluation seconds so far.
        flops: Training FLOPs so far, as priced.
    """

    step: int
    score: float
    loss: float
    metrics: Mapping[str, float]
    seconds: float
    evaluation_seconds: float
    flops: float

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        number: The trial's number in the study.
        candidate: What was trained.
        state: Only "complete" outcomes may be on the front.
        price: What it was known to cost.
        objectives: Value by objective name; complete outcomes have all of them.
        rungs: What it reported on the way, in order; pairs (step, score).
        origin: "baseline", "reference" (no adapter), "portfolio", "design", "search", "user".
        reason: Why it failed or was pruned, else empty.
        measured: Whatever else was measured, by name.
        audited_at: Step at which the pruner would have stopped it, had it not been picked to go on
            so that pruning can be judged; 0 if there was none.
    """

    number: int
    candidate: Candidate
    state: State
    price: Price
    objectives: Mapping[str, float]
    rungs: tuple[tuple[int, float], ...] = ()
    origin: str = "search"
    reason: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)
    audited_at: int = 0


@dataclass(frozen=True)
class SeedScore:
    """One retraining of a finalist.

    Attributes:
        seed: Seeds the adapter's initialisation and the order of the data.
        validation: Metrics on the validation split (quality and "loss").
        test: Metrics on the test split.
        test_rows: Quality of each test row (1.0 right, 0.0 wrong; or minus its loss), in the order
            of the split: what a paired bootstrap needs. Shape (n_test_rows,).
        objectives: Every objective's value, quality taken from the test split.
    """

    seed: int
    validation: Mapping[str, float]
    test: Mapping[str, float]
    test_rows: tuple[float, ...]
    objectives: Mapping[str, float]


@dataclass(frozen=True)
class Finalist:
    """A candidate retrained with several seeds and scored on the test split.

    Attributes:
        candidate: What it is.
        price: What it costs.
        origin: As of its trial; "compressed" if it was not trained but cut from another.
        seeds: One score a retraining.
        compressed_from: Digest of the finalist it was cut from, else empty.
    """

    candidate: Candidate
    price: Price
    origin: str
    seeds: tuple[SeedScore, ...]
    compressed_from: str = ""

    def mean(self, name: str, split: Literal["validation", "test"] = "test") -> float:
        """Mean of a metric over the seeds."""
        values = [(s.test if split == "test" else s.validation)[name] for s in self.seeds]
        return sum(values) / len(values)


@dataclass(frozen=True)
class LevelVerdict:
    """The front against the tuned LoRA at one efficiency level.

    Attributes:
        digest: The front member.
        result: "wins", "ties" or "loses", on test quality, after correction for many comparisons.
        gain: Quality of the member minus quality of the tuned LoRA, sign such that more is better.
        gain_ci: Its corrected 95 % interval, same sign.
        cost_ratio: The member's first cost over that LoRA's.
        against: Digest of the LoRA compared with: the best one that costs no more than the member,
            or the tuned one where every LoRA costs more.
    """

    digest: str
    result: Literal["wins", "ties", "loses"]
    gain: float
    gain_ci: tuple[float, float]
    cost_ratio: float
    against: str = ""


@dataclass(frozen=True)
class Verdict:
    """Does the front beat a well-tuned LoRA? `text` is one sentence for people."""

    beats_lora: bool
    text: str
    levels: tuple[LevelVerdict, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """`{"beats_lora", "text", "levels"}`."""
        return asdict(self)


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
