"""Notices a training whose loss has left the range that it began in and stays there."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

_N_FIRST, _N_LAST = 2, 10

_FACTOR = 2.0
"""Every one of the last losses must exceed the largest of the first ones by this factor. So a few
hard batches are no divergence, nor is a collapse to the loss of a guess, which rungs reveal. In the
63 trainings of Hugging Face's comparison on MetaMathQA, no loss exceeds 1.21 times its first."""


class LossWatch:
    """Watches the losses of one training.

    Where the model solves most rows already, the first batches may happen to be far easier than all
    that follow, and that for every candidate of a search. So before losses count as diverged, the
    first batch is trained on once more: it must have become as hard as the others are.

    Attributes:
        wants_first: Whether the next loss must be that of the first batch again.

    Example:
        >>> from autopeft.training.loss_watch import LossWatch
        >>> watch = LossWatch()
        >>> watch.add([0.7, 0.6, *[2.0] * 9, 1.9])
        >>> watch.wants_first
        True
        >>> watch.add([2.1])
        (0.7, 1.99)
    """

    def __init__(self) -> None:
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=_N_LAST)
        self.wants_first = False

    def add(self, losses: Sequence[float]) -> tuple[float, float] | None:
        """Take the next losses; if they have diverged, return where they began and their mean."""
        start = max(self._first, default=0.0)
        if self.wants_first and losses:
            self.wants_first = False
            if losses[0] > (start + min(self._last)) / 2:
                return start, sum(self._last) / _N_LAST
            # The first batches were easy: losses as seen since are in range.
            self._first = [max(self._last)]
            losses = losses[1:]
        for loss in losses:
            if len(self._first) < _N_FIRST and not self._last:
                # The second is that after an update, which may have blown up already.
                first = self._first[0] if self._first else loss
                self._first.append(min(loss, _FACTOR * first) if first > 0 else loss)
            else:
                self._last.append(loss)
        start = max(self._first, default=0.0)
        is_full = len(self._last) == _N_LAST
        self.wants_first = is_full and 0 < _FACTOR * start < min(self._last)
        return None
