"""Warm start: trials of an earlier search on other data.

Qualities on two data sets cannot be compared, but good candidates of one are mostly good on the
other. So earlier qualities are standardized, and how far to trust them is learned from the trials
of this search (see `WarmStart.translate`). They are never results of this search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopeft.costs.objectives import Objective
from autopeft.errors import SpaceError, StorageError
from autopeft.plan import Candidate
from autopeft.searcher.space.encoding import Point
from autopeft.searcher.space.space import SearchSpace
from autopeft.trial import Trial, front_of
from autopeft.utils.serialize import from_plain, to_plain

Array = NDArray[np.float64]

_MAX_TRIALS = 80
"""Number of earlier trials that the model uses: the best ones."""

_MIN_NOISE = 0.5
"""Lower bound on the noise of an earlier quality, in standard deviations of the qualities here."""

_PSEUDO_TRIALS = 2.0
"""Weight of the assumption that one standard deviation there is one here, in trials."""


@dataclass(frozen=True)
class WarmStartTrial:
    """A trial of an earlier search.

    Attributes:
        candidate: What was trained.
        quality: Standardized over that search's trials; larger is better.
        is_on_front: Whether it was on that search's front.
    """

    candidate: Candidate
    quality: float
    is_on_front: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for the state of the search."""
        return {**to_plain(self), "candidate": self.candidate.to_json()}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> WarmStartTrial:
        """Return the trial that `to_json` wrote.

        Raises:
            UserError: if a value is damaged.
        """
        candidate = Candidate.from_json(row.get("candidate"))
        return from_plain(cls, {**row, "candidate": candidate}, field="trial", error=StorageError)


def warm_start_trials(
    trials: Sequence[Trial], objectives: Sequence[Objective]
) -> tuple[WarmStartTrial, ...]:
    """Standardize the complete trials that have an adapter; return them best first."""
    complete = [t for t in trials if t.state == "complete" and t.plan.specs]
    quality = objectives[0]
    values = np.array([quality.sign() * t.values[quality.name] for t in complete])
    spread = float(values.std()) if len(values) else 0.0
    if spread <= 0.0:
        return ()
    front = {t.number for t in front_of(complete, objectives)}
    return tuple(
        WarmStartTrial(
            complete[i].candidate,
            float((values[i] - values.mean()) / spread),
            complete[i].number in front,
        )
        for i in np.argsort(-values, kind="stable")
    )


@dataclass(frozen=True)
class WarmStart:
    """Earlier trials as points of this search's space.

    Attributes:
        points: The points.
        qualities: Standardized qualities, larger is better, shape (n,).
        front: Members of the earlier front as candidates of this search, fewest sites first.
    """

    points: tuple[Point, ...] = ()
    qualities: Array = field(default_factory=lambda: np.zeros(0))
    front: tuple[Candidate, ...] = ()

    @classmethod
    def of(cls, trials: Sequence[WarmStartTrial], space: SearchSpace) -> WarmStart:
        """Keep the trials that are in the space."""
        points: list[Point] = []
        qualities: list[float] = []
        front: list[Candidate] = []
        for trial in trials:
            # Steps and batch size do not matter for the point.
            train = replace(
                trial.candidate.train, steps=space.base.steps, batch_size=space.base.batch_size
            )
            try:
                point = space.encoder.from_candidate(Candidate(trial.candidate.plan, train))
            except SpaceError:
                continue
            if len(points) < _MAX_TRIALS:
                points.append(point)
                qualities.append(trial.quality)
            if trial.is_on_front:
                front.append(space.encoder.to_candidate(point))
        front.sort(key=lambda candidate: len(candidate.plan.specs))
        return cls(tuple(points), np.array(qualities), tuple(front))

    def __len__(self) -> int:
        return len(self.points)

    def translate(self, here: Array, there: Array) -> tuple[Array, Array]:
        """Express the earlier qualities in the unit of this search, with their noise.

        Args:
            here: Qualities of this search's trials, larger is better, shape (n,), n >= 2.
            there: Standardized qualities that the earlier search predicts for the same points,
                shape (n,).

        Returns:
            Values and standard deviations, each of shape (len(self),).
        """
        spread = max(float(here.std()), 1e-12)
        centered = there - there.mean()
        # Linear regression, regularized towards one standard deviation for one.
        covariance = float(centered @ (here - here.mean())) + _PSEUDO_TRIALS * spread
        slope = max(0.0, covariance / (float(centered @ centered) + _PSEUDO_TRIALS))
        errors = here - here.mean() - slope * centered
        noise = max(_MIN_NOISE * spread, float(np.sqrt(np.mean(errors**2))))
        values = here.mean() + slope * (self.qualities - there.mean())
        return values, np.full(len(self.qualities), noise)
