"""Trial: a candidate from ask to report, and the front of completed trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import numpy as np

from autopeft.costs import Price
from autopeft.costs.objectives import Objective
from autopeft.plan import AdapterPlan, Candidate, TrainSettings
from autopeft.plan_text import plan_summary
from autopeft.utils.pareto import Array, non_dominated

State = Literal["running", "complete", "pruned", "failed"]

INTERRUPTED = "interrupted"
"""Reason of a trial that was running when its search was killed."""

DUPLICATE = "another search of this study began this candidate first"
"""Reason of a trial that was not trained; nothing but the study knows of it."""

TIME_UP = "the search's share of the budget ended"
"""Reason of a trial that was stopped by the clock, not by the pruner."""


class Decision(Enum):
    """What a trial should do after a rung.

    Example:
        >>> topology = autopeft.Topology(2, {"attn.q": (64, 64), "attn.v": (64, 64)})
        >>> space = autopeft.SearchSpace.from_source({"methods": ["lora", "ia3"]}, topology)
        >>> controller = autopeft.SearchController(space, ["accuracy", "trainable_params"])
        >>> trial = controller.ask()
        >>> controller.report(trial, step=10, score=0.6)
        <Decision.CONTINUE: 'continue'>
    """

    CONTINUE = "continue"
    STOP = "stop"


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


@dataclass(frozen=True)
class Trial:
    """A candidate from ask to report: the one record of it.

    A trial that was just asked for is running and has no values yet. Each change makes a new value
    of the same number; the search controller keeps the latest.

    Attributes:
        number: Its number in the study.
        candidate: What is trained.
        costs: What it costs, known before training.
        origin: "baseline", "reference" (no adapter), "portfolio", "design", "search", "user".
        state: Only "complete" trials can be on the front.
        values: Value by objective name; complete trials have all of them.
        rungs: Reported scores in order, as pairs (step, score).
        reason: Why it failed or was pruned; otherwise empty.
        measured: Other measured values by name.
        audited_at: Step at which the pruner would have stopped it, if it was continued to estimate
            what pruning costs; otherwise 0.
        broken: Limits on measured values that it breaks. Such a trial is complete, but not on the
            front.

    Example:
        >>> topology = autopeft.Topology(2, {"attn.q": (64, 64), "attn.v": (64, 64)})
        >>> space = autopeft.SearchSpace.from_source({"methods": ["lora", "ia3"]}, topology)
        >>> controller = autopeft.SearchController(space, ["accuracy", "trainable_params"])
        >>> trial = controller.ask()
        >>> trial.state
        'running'
        >>> controller.tell(trial, score=0.8)
        >>> controller.trials()[0].values["accuracy"]
        0.8
    """

    number: int
    candidate: Candidate
    costs: Price
    origin: str = "search"
    state: State = "running"
    values: Mapping[str, float] = field(default_factory=dict)
    rungs: tuple[tuple[int, float], ...] = ()
    reason: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)
    audited_at: int = 0
    broken: tuple[str, ...] = ()

    @property
    def plan(self) -> AdapterPlan:
        """The candidate's plan."""
        return self.candidate.plan

    @property
    def train(self) -> TrainSettings:
        """The candidate's training settings."""
        return self.candidate.train

    @property
    def digest(self) -> str:
        """The candidate's identity."""
        return self.candidate.digest

    def value(self, name: str) -> float:
        """Return what a complete trial told: an objective, or what was measured beside them.

        Raises:
            KeyError: if it told no such value.
        """
        return self.values[name] if name in self.values else self.measured[name]


Outcome = Trial
"""The name that a trial that has ended had in the first edition."""


def facts(candidate: Candidate, costs: Price) -> dict[str, Any]:
    """Return what people want to see of a trial: for attributes of a study, parameters of a run."""
    plan = candidate.plan
    return {
        "adapter": plan_summary(plan),
        "methods": "+".join(plan.methods) or "none",
        "largest_rank": max((spec.rank for spec in plan.specs), default=0),
        "n_sites": len(plan.specs),
        "modules": ", ".join(sorted({spec.role for spec in plan.specs})),
        "learning_rate": candidate.train.learning_rate,
        "trainable_params": costs.trainable_params,
    }


def oriented(values: Sequence[Mapping[str, float]], objectives: Sequence[Objective]) -> Array:
    """Return values by name as rows in which larger is better; NaN where one lacks a value.

    Returns:
        Shape (len(values), len(objectives)).
    """
    rows = [[o.sign() * each.get(o.name, np.nan) for o in objectives] for each in values]
    return np.array(rows, dtype=float).reshape(-1, len(objectives))


def front_of(trials: Sequence[Trial], objectives: Sequence[Objective]) -> tuple[Trial, ...]:
    """The non-dominated trials, cheapest first; complete ones that break no limit.

    The order is by the second objective, or by the quality if it is alone.
    """
    complete = [trial for trial in trials if trial.state == "complete" and not trial.broken]
    mask = non_dominated(oriented([trial.values for trial in complete], objectives))
    members = [trial for trial, is_kept in zip(complete, mask, strict=True) if is_kept]
    key = objectives[1] if len(objectives) > 1 else objectives[0]
    return tuple(sorted(members, key=lambda trial: -key.sign() * trial.values[key.name]))
