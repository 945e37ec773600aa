"""A stand-in for a training, for tests of who trains what."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

import autopeft

SHORT: dict[str, Any] = {
    **{"steps": 9, "rungs": 1, "budget": "3trials", "max_finalists": 1, "confirm_seeds": 1},
    **{"metric": "accuracy", "backend": "local", "progress": False},
}
"""Settings of a search that is over at once."""


def trained(candidate: autopeft.Candidate, *, seed: int, report: autopeft.TrialReport) -> Any:
    """Stand in for a training: more adapters are better."""
    level = 0.5 + 0.4 * (1 - float(2.0 ** (-sum(s.rank or 1 for s in candidate.plan.specs) / 10)))
    (report.folder / "weights.txt").write_text(candidate.digest)
    if not report.is_confirming:
        return {"accuracy": level}
    rows = np.random.default_rng(1).random(200) < level
    return {"accuracy": level, "test_accuracy": rows.mean()}, rows.astype(float)


class Held:
    """A training function that waits in its first call until it is let go."""

    def __init__(self) -> None:
        self.began, self.may_go_on = threading.Event(), threading.Event()

    def __call__(self, candidate: Any, *, seed: int, report: Any) -> Any:
        self.began.set()
        assert self.may_go_on.wait(100)
        return trained(candidate, seed=seed, report=report)
