"""What goes to a worker and what comes back: jobs and messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from autopeft.confirm.finalists import Compressed, SeedScore
from autopeft.plan import Candidate
from autopeft.trial import RungReport


@dataclass(frozen=True)
class Job:
    """One training for a worker.

    Attributes:
        kind: "search" reports at rungs and may be stopped; "confirm" trains to the end, scores the
            test split and hands its adapter back.
        candidate: What to train.
        seed: Seeds initialization and data order.
        number: The trial's number in the study; -1 for a confirmation.
        lower_ranks: The same candidate at lower ranks: a confirmation scores them too, cut from
            what it trained.
    """

    kind: Literal["search", "confirm"]
    candidate: Candidate
    seed: int
    number: int = -1
    lower_ranks: tuple[Candidate, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return {
            "kind": self.kind,
            "candidate": self.candidate.to_json(),
            "seed": self.seed,
            "number": self.number,
            "lower_ranks": [candidate.to_json() for candidate in self.lower_ranks],
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Job:
        """The job that `to_json` wrote."""
        candidate = Candidate.from_json(row["candidate"])
        lower = tuple(Candidate.from_json(each) for each in row["lower_ranks"])
        return cls(row["kind"], candidate, row["seed"], row["number"], lower)


@dataclass(frozen=True)
class Activity:
    """Worker seconds by what they were spent on.

    Attributes:
        train: Training steps.
        evaluate: Scoring validation and test rows.
        attach: Attaching, detaching and saving adapters.
        cache: Filling the activation cache, which later trials reuse.
    """

    train: float = 0.0
    evaluate: float = 0.0
    attach: float = 0.0
    cache: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.train + self.evaluate + self.attach + self.cache

    def __add__(self, other: Activity) -> Activity:
        return Activity(
            self.train + other.train,
            self.evaluate + other.evaluate,
            self.attach + other.attach,
            self.cache + other.cache,
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
        files: The trained adapter: relative path -> content.
        activity: Seconds the job took.
        flops: Training FLOPs, as priced.
        compressed: The same at lower ranks.
    """

    score: SeedScore
    files: Mapping[str, bytes]
    activity: Activity
    flops: float
    compressed: tuple[Compressed, ...] = ()


@dataclass(frozen=True)
class FailureMessage:
    """A job could not be finished; the worker lives on."""

    reason: str
    activity: Activity = field(default_factory=Activity)


Message = RungMessage | ConfirmMessage | FailureMessage
