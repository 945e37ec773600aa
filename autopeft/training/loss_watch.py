"""Notices a training whose loss has left the range that it began in and stays there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

_N_FIRST, _N_LAST = 2, 10

_FACTOR = 2.0
"""Every one of the last losses must exceed the largest of the first ones by this factor. So a few
hard batches are no divergence, nor is a collapse to the loss of a guess, which rungs reveal."""


class LossWatch:
    """Watches the losses of one training.

    Example:
        >>> from autopeft.training.loss_watch import LossWatch
        >>> watch = LossWatch()
        >>> watch.add([0.7, 0.6, *[2.0] * 9])
        >>> watch.add([1.9])
        (0.7, 1.99)
    """

    def __init__(self) -> None:
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=_N_LAST)

    def add(self, losses: Iterable[float]) -> tuple[float, float] | None:
        """Take the next losses; if they have diverged, return where they began and their mean."""
        for loss in losses:
            if len(self._first) < _N_FIRST:
                self._first.append(loss)
            else:
                self._last.append(loss)
        start = max(self._first, default=0.0)
        if start <= 0 or len(self._last) < _N_LAST or min(self._last) <= _FACTOR * start:
            return None
        return start, sum(self._last) / _N_LAST
