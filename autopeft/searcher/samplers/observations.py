"""What the trials so far say about quality, finished or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopeft.searcher.samplers.base import Seen
from autopeft.searcher.space.encoding import Point

Array = NDArray[np.float64]

_N_TO_RELATE = 5
"""Complete trials needed to tell from a rung's score how a trial would have ended."""


@dataclass(frozen=True)
class Observations:
    """Points and their qualities, larger is better.

    Attributes:
        points: The points.
        values: Quality of each, shape (n,).
        noise: Standard deviation where the quality is only an estimate, else 0; shape (n,).
        is_final: False for estimates from a rung, which are on no front; shape (n,).
        trials: The trial behind each point, None for one that is not known yet.
    """

    points: tuple[Point, ...]
    values: Array
    noise: Array
    is_final: NDArray[np.bool_]
    trials: tuple[Seen | None, ...]

    def extended(
        self, points: Sequence[Point], values: Array, noise: Array, *, is_final: bool = True
    ) -> Observations:
        """With points that are being trained, at the quality expected of them."""
        return Observations(
            (*self.points, *points),
            np.append(self.values, values),
            np.append(self.noise, noise),
            np.append(self.is_final, np.full(len(points), is_final)),
            (*self.trials, *(None for _ in points)),
        )


def gather(history: Sequence[Seen], sign: float, n_most: int) -> Observations:
    """Complete trials, and pruned ones at the quality their last rung predicts.

    Args:
        history: All trials.
        sign: +1 if quality is maximized, else -1.
        n_most: Observations to keep; the best, the latest and the final come first.
    """
    complete = [s for s in history if s.state == "complete" and s.point is not None]
    rows = [(s, sign * s.objectives[0], 0.0, True) for s in complete]
    for seen in history:
        if seen.state == "pruned" and seen.point is not None and seen.rungs:
            estimate = _foresee(seen, complete, sign)
            if estimate is not None:
                rows.append((seen, *estimate, False))
    if len(rows) > n_most:
        values = np.array([value for _, value, _, _ in rows])
        score = values.argsort().argsort() / len(rows) + 0.5 * np.arange(len(rows)) / len(rows)
        score += [0.3 * is_final for *_, is_final in rows]
        rows = [rows[i] for i in np.sort(np.argsort(-score)[:n_most])]
    return Observations(
        tuple(s.point for s, *_ in rows if s.point is not None),
        np.array([value for _, value, _, _ in rows]),
        np.array([noise for _, _, noise, _ in rows]),
        np.array([is_final for *_, is_final in rows], dtype=bool),
        tuple(s for s, *_ in rows),
    )


def _foresee(seen: Seen, complete: Sequence[Seen], sign: float) -> tuple[float, float] | None:
    """(expected final quality, its standard deviation) from a trial's last rung.

    A straight line through the complete trials' scores at that rung and final qualities.
    """
    step = max(seen.rungs)
    pairs = [(sign * s.rungs[step], sign * s.objectives[0]) for s in complete if step in s.rungs]
    pairs = [pair for pair in pairs if np.isfinite(pair).all()]
    score = sign * seen.rungs[step]
    if len(pairs) < _N_TO_RELATE or not np.isfinite(score):
        return None
    x, y = np.array(pairs).T
    if np.ptp(x) <= 0:
        return None
    slope = max(float(np.mean((x - x.mean()) * (y - y.mean())) / x.var()), 0.0)
    fitted = y.mean() + slope * (x - x.mean())
    error = float(np.sqrt(np.mean((y - fitted) ** 2)))
    value = float(y.mean() + slope * (score - x.mean()))
    # Pruned trials lie outside the scores of complete ones: no further than half their range.
    reach = 0.5 * float(np.ptp(y))
    value = min(max(value, float(y.min()) - reach), float(y.max()))
    return value, max(error, 0.1 * float(y.std()))
