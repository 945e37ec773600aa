"""Warm start: trials of an earlier search, and rows of a prior.

Qualities on two data sets cannot be compared, but good candidates of one are mostly good on the
other. So earlier qualities are standardized, and how far each search or setting agrees with this
one is learned from this one's trials (see `GaussianProcess`). They are no results of this search.
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
from autopeft.searcher.samplers.prior import PriorRow, normal_scores, point_of
from autopeft.searcher.space.encoding import Point
from autopeft.searcher.space.space import SearchSpace
from autopeft.trial import Trial, front_of
from autopeft.utils.extremes import usable
from autopeft.utils.serialize import from_plain, to_plain

Array = NDArray[np.float64]

_MAX_TRIALS = 80
"""Number of earlier trials of one search or setting that the model uses."""


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
    values = usable([quality.sign() * t.values[quality.name] for t in complete])
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
        qualities: Standardized within each source, larger is better, shape (n,).
        sources: Number of the search or setting of each, from 1 on, shape (n,).
        front: Members of the earlier front as candidates of this search, fewest sites first.
        n_rows: How many of the points are rows of the prior.
    """

    points: tuple[Point, ...] = ()
    qualities: Array = field(default_factory=lambda: np.zeros(0))
    sources: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    front: tuple[Candidate, ...] = ()
    n_rows: int = 0

    @classmethod
    def of(
        cls, trials: Sequence[WarmStartTrial], space: SearchSpace, rows: Sequence[PriorRow] = ()
    ) -> WarmStart:
        """Keep the trials of an earlier search and the rows of a prior that are in the space."""
        found: dict[int, list[tuple[Point, float]]] = {}
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
            known = found.setdefault(0, [])
            if len(known) < _MAX_TRIALS:
                known.append((point, trial.quality))
            if trial.is_on_front:
                front.append(space.encoder.to_candidate(point))
        front.sort(key=lambda candidate: len(candidate.plan.specs))
        settings = list(dict.fromkeys(row.setting for row in rows))
        for row, quality in zip(rows, normal_scores(rows), strict=True):
            point_of_row = point_of(row, space)
            if point_of_row is not None:
                number = 1 + settings.index(row.setting)
                found.setdefault(number, []).append((point_of_row, float(quality)))
        kept = [
            (point, quality, source)
            for source, number in enumerate(sorted(found), 1)
            for point, quality in _thinned(found[number])
        ]
        return cls(
            tuple(point for point, _, _ in kept),
            np.array([quality for _, quality, _ in kept]),
            np.array([source for _, _, source in kept], dtype=np.int64),
            tuple(front),
            sum(len(_thinned(found[number])) for number in found if number),
        )

    def __len__(self) -> int:
        return len(self.points)


def _thinned(rows: list[tuple[Point, float]]) -> list[tuple[Point, float]]:
    """Return at most `_MAX_TRIALS` of them, evenly from first to last."""
    if len(rows) <= _MAX_TRIALS:
        return rows
    return [rows[i] for i in np.linspace(0, len(rows) - 1, _MAX_TRIALS).round().astype(int)]
