"""Whether scoring at a rung saves more than it takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_FEWEST = 8
"""Complete trials before a rung is judged: with fewer, the pruner stops none or few."""


@dataclass
class _Rung:
    """Trials that reached a rung, those that it stopped, and worker seconds, summed over trials.

    `before` are those up to and with the scoring.
    """

    n_reached: int = 0
    n_stopped: int = 0
    before: float = 0.0
    scoring: float = 0.0


class RungValue:
    """Adds up what each rung takes and stops.

    A rung pays if the share of trials that it stops, times what a stopped trial saves, is at least
    what scoring takes. The share is that seen so far with one more stop added, so a rung is not
    given up early. Whether what it stops is rightly stopped is the pruner's business.

    Example:
        >>> from autopeft.engine.rung_value import RungValue
        >>> value = RungValue()
        >>> for _ in range(30):
        ...     value.note_rung(25, 5.0, scoring=1.0, is_stopped=False)
        ...     value.note_end(15.0)
        >>> value.without_value([25])
        (25,)
    """

    def __init__(self) -> None:
        self._rungs: dict[int, _Rung] = {}
        self._n_complete = 0
        self._complete_seconds = 0.0

    def note_end(self, seconds: float) -> None:
        """Add a complete trial, given its worker seconds."""
        self._n_complete += 1
        self._complete_seconds += seconds

    def note_rung(self, step: int, seconds: float, *, scoring: float, is_stopped: bool) -> None:
        """Add a trial at a rung, given its worker seconds so far and those of scoring there."""
        if self._n_complete < _FEWEST:
            return
        rung = self._rungs.setdefault(step, _Rung())
        rung.n_reached += 1
        rung.n_stopped += is_stopped
        rung.before += seconds
        rung.scoring += scoring

    def without_value(self, steps: Iterable[int]) -> tuple[int, ...]:
        """Return the rungs among `steps` that take more than they save."""
        return tuple(s for s in steps if (rung := self._rungs.get(s)) and not self._pays(rung))

    def _pays(self, rung: _Rung) -> bool:
        stopped = (rung.n_stopped + 1) / (rung.n_reached + 1)
        whole = self._complete_seconds / self._n_complete
        saved = whole - rung.before / rung.n_reached
        return stopped * saved >= rung.scoring / rung.n_reached

    def text(self, step: int) -> str:
        """Return why a rung was given up, for the user."""
        rung = self._rungs[step]
        share = rung.scoring / rung.n_reached * self._n_complete / self._complete_seconds
        return (
            f"trials are no longer scored at step {step}: the rung stopped {rung.n_stopped} of "
            f"{rung.n_reached}, and takes {share:.0%} of a training (set rungs to keep it)"
        )
