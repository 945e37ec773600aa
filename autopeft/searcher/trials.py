"""A trial on the search's side: the handle given out, and what is remembered of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from autopeft.costs import Price
from autopeft.costs.objectives import Objective
from autopeft.plan import AdapterPlan, Candidate, TrainSettings
from autopeft.plan_text import read_plan
from autopeft.searcher.study import AUDIT_KEY, StoredTrial
from autopeft.trial import Outcome


class Decision(Enum):
    """What a trial should do after a rung."""

    CONTINUE = "continue"
    STOP = "stop"


@dataclass(frozen=True)
class Trial:
    """A candidate handed out.

    Attributes:
        number: In the study.
        candidate: What to train.
        price: What it is known to cost.
        origin: "baseline", "reference", "portfolio", "design", "search" or "user".
    """

    number: int
    candidate: Candidate
    price: Price
    origin: str

    @property
    def plan(self) -> AdapterPlan:
        """The candidate's plan."""
        return self.candidate.plan

    @property
    def train(self) -> TrainSettings:
        """The candidate's training settings."""
        return self.candidate.train


@dataclass
class Record:
    """A trial as the controller remembers it."""

    trial: Trial
    state: Literal["complete", "pruned", "failed", "running"] = "running"
    objectives: dict[str, float] = field(default_factory=dict)
    rungs: list[tuple[int, float]] = field(default_factory=list)
    reason: str = ""
    measured: dict[str, float] = field(default_factory=dict)
    audited_at: int = 0

    def outcome(self) -> Outcome:
        """What others get to see, once the trial has ended."""
        assert self.state != "running"
        return Outcome(
            self.trial.number,
            self.trial.candidate,
            self.state,
            self.trial.price,
            dict(self.objectives),
            tuple(self.rungs),
            self.trial.origin,
            self.reason,
            dict(self.measured),
            self.audited_at,
        )


def read_record(stored: StoredTrial, objectives: Sequence[Objective]) -> Record:
    """A trial of the study as a record."""
    attributes = stored.attributes
    candidate = Candidate(
        read_plan(attributes["plan"]), TrainSettings.from_json(attributes["train"])
    )
    trial = Trial(
        stored.number, candidate, Price(**attributes["price"]), attributes.get("origin", "search")
    )
    return Record(
        trial,
        stored.state,
        {o.name: v for o, v in zip(objectives, stored.values, strict=False)},
        list(stored.rungs),
        attributes.get("reason", ""),
        dict(attributes.get("measured", {})),
        int(attributes.get(AUDIT_KEY, 0)),
    )
