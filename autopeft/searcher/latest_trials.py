"""The latest value of every trial of a search, and what is counted of them at each call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from autopeft.trial import INTERRUPTED, Trial


class LatestTrials(Sequence[Trial]):
    """Every trial in the order they were started; a change replaces one value.

    Samplers read it in place: of tens of thousands of trials no call can afford a copy, or a look
    at each. A trial keeps its place when its value changes.

    Attributes:
        changes: Place of each trial that was added or changed, in that order.
        n_audited: Number of trials that continue past a rung that would have stopped them.
    """

    def __init__(self) -> None:
        self._rows: list[Trial] = []
        self._row_of: dict[int, int] = {}
        self._baselines: dict[int, Trial] = {}
        self.changes: list[int] = []
        self.n_audited = 0

    def put(self, trial: Trial) -> None:
        """Add a trial, or replace the value of the trial of that number."""
        row = self._row_of.setdefault(trial.number, len(self._rows))
        self.changes.append(row)
        if row == len(self._rows):
            self._rows.append(trial)
        else:
            self.n_audited -= self._rows[row].audited_at > 0
            self._rows[row] = trial
        self.n_audited += trial.audited_at > 0
        if trial.origin == "baseline":
            self._baselines[trial.number] = trial

    def of(self, number: int) -> Trial | None:
        """Return the trial of a number; None if there is none."""
        row = self._row_of.get(number)
        return None if row is None else self._rows[row]

    def by_number(self) -> list[Trial]:
        """Return all of them by number."""
        return [self._rows[row] for _, row in sorted(self._row_of.items())]

    def baselines(self) -> list[Trial]:
        """Return the LoRA baselines, but those that are trained again."""
        return [trial for trial in self._baselines.values() if trial.reason != INTERRUPTED]

    @overload
    def __getitem__(self, index: int) -> Trial: ...

    @overload
    def __getitem__(self, index: slice) -> list[Trial]: ...

    def __getitem__(self, index: int | slice) -> Trial | list[Trial]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Trial]:
        return iter(self._rows)
