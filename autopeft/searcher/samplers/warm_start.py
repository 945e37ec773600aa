"""What an earlier search on other data knows: a start for this one, never a result of it.

Qualities on two data sets cannot be compared, but what tends to be good on one mostly is on the
other. So earlier qualities are only used in units of their own spread; how far they can be trusted
here is learned from the trials of this search (see `Prior.translated`), and a prior that misleads
is soon left aside.
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

_N_MOST = 80
"""Earlier trials that are kept: the best ones."""

_LEAST_NOISE = 0.5
"""Noise of an earlier quality here, in spreads of the qualities here, however well it fits."""

_TRUST = 2.0
"""Trials' worth of belief that a spread there is a spread here."""


@dataclass(frozen=True)
class WarmStartTrial:
    """An earlier trial.

    Attributes:
        candidate: What was trained.
        quality: In spreads above the mean of that search; larger is better.
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
    """Outcomes as prior knowledge: complete ones that have an adapter, the best first."""
    complete = [o for o in trials if o.state == "complete" and o.candidate.plan.specs]
    quality = objectives[0]
    values = np.array([quality.sign() * o.values[quality.name] for o in complete])
    spread = float(values.std()) if len(values) else 0.0
    if spread <= 0.0:
        return ()
    front = {o.number for o in front_of(complete, objectives)}
    order = np.argsort(-values, kind="stable")
    return tuple(
        WarmStartTrial(
            complete[i].candidate,
            float((values[i] - values.mean()) / spread),
            complete[i].number in front,
        )
        for i in order
    )


@dataclass(frozen=True)
class Prior:
    """Earlier trials as points of this search's space.

    Attributes:
        points: The points.
        qualities: In spreads above the mean there, shape (n,).
        starters: Members of that front, as candidates of this search, cheapest first.
    """

    points: tuple[Point, ...] = ()
    qualities: Array = field(default_factory=lambda: np.zeros(0))
    starters: tuple[Candidate, ...] = ()

    @classmethod
    def of(cls, trials: Sequence[WarmStartTrial], space: SearchSpace) -> Prior:
        """Those that are points of the space; the rest is left out."""
        points: list[Point] = []
        qualities: list[float] = []
        starters: list[tuple[int, Candidate]] = []
        for trial in trials:
            # What was trained for longer or shorter is the same point.
            train = replace(
                trial.candidate.train, steps=space.base.steps, batch_size=space.base.batch_size
            )
            try:
                point = space.encoder.from_candidate(Candidate(trial.candidate.plan, train))
            except SpaceError:
                continue
            if len(points) < _N_MOST:
                points.append(point)
                qualities.append(trial.quality)
            if trial.is_on_front:
                starters.append(
                    (len(trial.candidate.plan.specs), space.encoder.to_candidate(point))
                )
        starters.sort(key=lambda row: row[0])
        return cls(tuple(points), np.array(qualities), tuple(c for _, c in starters))

    def __len__(self) -> int:
        return len(self.points)

    def translated(self, here: Array, there: Array) -> tuple[Array, Array]:
        """The earlier qualities in the unit of this search, and their noise.

        Args:
            here: Qualities of this search's trials, shape (n,), n at least 2.
            there: What the prior expects of the same points, in its own spreads, shape (n,).

        Returns:
            Values and standard deviations, each of shape (len(self),).
        """
        spread = max(float(here.std()), 1e-12)
        centered = there - there.mean()
        # A straight line, pulled towards one spread for one spread.
        together = float(centered @ (here - here.mean())) + _TRUST * spread
        slope = max(0.0, together / (float(centered @ centered) + _TRUST))
        errors = here - here.mean() - slope * centered
        noise = max(_LEAST_NOISE * spread, float(np.sqrt(np.mean(errors**2))))
        values = here.mean() + slope * (self.qualities - there.mean())
        return values, np.full(len(self.qualities), noise)
