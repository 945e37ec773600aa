"""What comes back from training: objectives, rung reports, outcomes, finalists, the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from autopeft.costs import Price
from autopeft.costs.objectives import Objective
from autopeft.plan import Candidate
from autopeft.utils.pareto import Array, non_dominated

State = Literal["complete", "pruned", "failed"]


@dataclass(frozen=True)
class RungReport:
    """What a trial says at a rung.

    Attributes:
        step: Optimizer steps done.
        score: The pruning signal, in the direction of the quality objective. Validation loss tells
            more than a metric on few rows, so for a maximized metric this is minus the loss.
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


def points_of(outcomes: Sequence[Outcome], objectives: Sequence[Objective]) -> Array:
    """Oriented values of outcomes, one row each; NaN where an outcome lacks a value.

    Returns:
        Shape (len(outcomes), len(objectives)).
    """
    rows = [
        [o.sign() * outcome.objectives.get(o.name, np.nan) for o in objectives]
        for outcome in outcomes
    ]
    return np.array(rows, dtype=float).reshape(-1, len(objectives))


def front_of(outcomes: Sequence[Outcome], objectives: Sequence[Objective]) -> tuple[Outcome, ...]:
    """The non-dominated outcomes, cheapest first; only complete ones can be among them.

    Args:
        outcomes: Any outcomes.
        objectives: Quality first; the order is by the second one (by the first if it is alone).
    """
    complete = [outcome for outcome in outcomes if outcome.state == "complete"]
    mask = non_dominated(points_of(complete, objectives))
    members = [outcome for outcome, is_kept in zip(complete, mask, strict=True) if is_kept]
    key = objectives[1] if len(objectives) > 1 else objectives[0]
    return tuple(sorted(members, key=lambda o: -key.sign() * o.objectives[key.name]))
