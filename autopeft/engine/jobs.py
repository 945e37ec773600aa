"""What goes to a worker and what comes back: jobs and messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from autopeft.outcome import RungReport, SeedScore
from autopeft.plan import Candidate


@dataclass(frozen=True)
class Job:
    """One training for a worker.

    Attributes:
        kind: "search" reports at rungs and may be stopped; "confirm" trains to the end, scores the
            test split and hands its adapter back.
        candidate: What to train.
        seed: Seeds initialisation and data order.
        number: The trial's number in the study; -1 for a confirmation.
    """

    kind: Literal["search", "confirm"]
    candidate: Candidate
    seed: int
    number: int = -1

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return {
            "kind": self.kind,
            "candidate": self.candidate.to_json(),
            "seed": self.seed,
            "number": self.number,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Job:
        """The job that `to_json` wrote."""
        candidate = Candidate.from_json(row["candidate"])
        return cls(row["kind"], candidate, row["seed"], row["number"])


@dataclass(frozen=True)
class Activity:
    """Worker seconds by what they were spent on.

    Attributes:
        train: Training steps.
        evaluate: Scoring validation and test rows.
        attach: Attaching, detaching and saving adapters.
        prefix: Filling the cache of the frozen prefix, which later trials reuse.
    """

    train: float = 0.0
    evaluate: float = 0.0
    attach: float = 0.0
    prefix: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.train + self.evaluate + self.attach + self.prefix

    def __add__(self, other: Activity) -> Activity:
        return Activity(
            self.train + other.train,
            self.evaluate + other.evaluate,
            self.attach + other.attach,
            self.prefix + other.prefix,
        )


@dataclass(frozen=True)
class RungMessage:
    """A search job reached a rung.

    Attributes:
        report: What it measured.
        is_last: True at the end of its training.
        measured: Costs only known by measuring; filled in at the end.
        activity: Seconds since the job's previous message.
    """

    report: RungReport
    is_last: bool
    measured: Mapping[str, float] = field(default_factory=dict)
    activity: Activity = field(default_factory=Activity)


@dataclass(frozen=True)
class ConfirmMessage:
    """A confirmation is done.

    Attributes:
        score: Scores on both splits.
        files: The trained adapter: relative path -> content, or a handle that `fetch` resolves.
        activity: Seconds the job took.
        flops: Training FLOPs, as priced.
    """

    score: SeedScore
    files: Any
    activity: Activity
    flops: float


@dataclass(frozen=True)
class FailureMessage:
    """A job could not be finished; the worker lives on."""

    reason: str
    activity: Activity = field(default_factory=Activity)


Message = RungMessage | ConfirmMessage | FailureMessage
