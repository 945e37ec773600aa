"""What the built-in trackers share: which runs there are, and what is written about each."""

from __future__ import annotations

import math
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopeft.engine.callback import Callback, SearchStart
from autopeft.integrations.trackers.background import TrackerError
from autopeft.reporting.columns import split_name
from autopeft.searcher.controller import INTERRUPTED
from autopeft.trial import Trial, facts
from autopeft.workspace import Workspace

if TYPE_CHECKING:
    import pandas

    from autopeft.result import SearchResult

PROJECT = "autopeft"
"""Project or experiment of a user who named none."""


@dataclass(frozen=True)
class _Reported:
    """What a tracker has written of a search: where, and the numbers of ended trials."""

    where: str
    numbers: tuple[int, ...] = ()


class Tracker(Callback):
    """Reports a search to a store: a run for the search, and one for each trial, in one group.

    Ended trials that the store lacks are written when a search is resumed; so a tracker may be
    added late, and none is written twice.

    Attributes:
        name: Its name in `report_to`.
        where: Where it writes, for people.
    """

    name = ""
    where = ""

    # What each tracker defines

    def open(self, search: SearchStart, group: str) -> str:
        """Open the store and the search's run, or the same ones again; return where they are."""
        raise NotImplementedError

    def begin(self, number: int, parameters: Mapping[str, Any]) -> None:
        """Open a trial's run, or the same one again."""
        raise NotImplementedError

    def log(self, number: int, values: Mapping[str, float], step: int) -> None:
        """Write values of a trial that is open."""
        raise NotImplementedError

    def end(self, number: int, state: str, reason: str) -> None:
        """End a trial's run."""
        raise NotImplementedError

    def conclude(self, result: SearchResult) -> None:
        """Write the result to the search's run, and end it."""
        raise NotImplementedError

    @property
    def n_ended(self) -> int:
        """Number of trials that are written: the step of the search's run."""
        return len(self._ended)

    # What a search calls

    def on_search_begin(self, search: SearchStart) -> None:
        """Open the store."""
        self._search = search
        self._workspace = Workspace(search.folder)
        self._running: dict[int, int] = {}  # Number -> last step.
        self.where = self.open(search, f"{search.study_name}-{search.id}")
        before = self._workspace.recall(f"reported_{self.name}", _Reported)
        is_same = before is not None and before.where == self.where
        self._ended = set(before.numbers if before is not None and is_same else ())
        self._missing = [trial for trial in search.trials if trial.number not in self._ended]

    def _catch_up(self) -> None:
        """Write the ended trials that the store lacks; the search does not wait for that."""
        missing, self._missing = self._missing, []
        for trial in missing:
            self.on_trial_begin(trial)
            for step, score in trial.rungs:
                self.on_rung(trial, step, score)
            self.on_trial_end(trial)

    def on_trial_begin(self, trial: Trial) -> None:
        """Open the trial's run."""
        self._catch_up()
        self._running[trial.number] = 0
        self.begin(trial.number, parameters(trial))

    def on_rung(self, trial: Trial, step: int, score: float) -> None:
        """Write the score under the name of what it is; a second one at a step is left out."""
        if step <= self._running[trial.number]:
            return
        self._running[trial.number] = step
        self.log(trial.number, _rung_value(self._search, score), step)

    def on_trial_end(self, trial: Trial) -> None:
        """Write the final values, and end the run."""
        if values := _final_values(self._search, trial):
            self.log(trial.number, values, self._running[trial.number])
        self._end(trial.number, trial.state, trial.reason)

    def _end(self, number: int, state: str, reason: str) -> None:
        self.end(number, state, reason)
        del self._running[number]
        self._ended.add(number)
        kept = _Reported(self.where, tuple(sorted(self._ended)))
        self._workspace.remember(f"reported_{self.name}", kept)

    def on_search_end(self, result: SearchResult) -> None:
        """End what is still open; write the result."""
        self._catch_up()
        for number in tuple(self._running):
            self._end(number, "failed", INTERRUPTED)
        self.conclude(result)


def parameters(trial: Trial) -> dict[str, Any]:
    """Return the parameters of a trial's run."""
    return {
        **facts(trial.candidate, trial.costs),
        "steps": trial.train.steps,
        "batch_size": trial.train.batch_size,
        "origin": trial.origin,
        "digest": trial.digest,
    }


def _rung_value(search: SearchStart, score: float) -> dict[str, float]:
    """Return a score under the name of what it is: a task's is a loss, a function's its quality."""
    quality = search.objectives[0]
    if search.settings.get("evaluate"):
        return {f"rung/{quality.name}": score}
    return {"rung/validation_loss": -score if quality.direction == "maximize" else score}


def _final_values(search: SearchStart, trial: Trial) -> dict[str, float]:
    """Return what is known of a complete trial; its quality is that of one seed."""
    quality, split = search.objectives[0].name, "validation"
    return _metrics("final", {**trial.measured, **trial.values}, quality, split)


def _metrics(group: str, values: Mapping[str, float], quality: str, split: str) -> dict[str, float]:
    """Return the finite values by their names in a tracker: the quality is named by its split."""
    named = {f"{split}_{quality}" if k == quality else k: v for k, v in values.items()}
    return {f"{group}/{name}": float(v) for name, v in named.items() if math.isfinite(v)}


def search_parameters(search: SearchStart) -> dict[str, Any]:
    """Return the settings that are not empty, as the parameters of the search's run."""
    return {name: value for name, value in search.settings.items() if value not in (None, "", [])}


def front_frame(result: SearchResult) -> pandas.DataFrame | None:
    """Return the front with the tuned LoRA and the reference, and the seeds behind each number.

    None before any trial is complete.
    """
    if not result.view.entries():
        return None
    frame = result.to_pandas().reset_index()
    entries = [result.view.find(digest) for digest in frame["digest"]]
    seeds = [
        ", ".join(str(line.seed) for line in entry.seeds) if entry else "" for entry in entries
    ]
    frame.insert(len(frame.columns), "seeds", seeds)
    return frame


def result_values(result: SearchResult) -> dict[str, float]:
    """Return the numbers of the pick, for the search's run."""
    best = result.best
    if best is None:
        return {}
    split = split_name(result.view, result.view.is_confirmed)
    return _metrics("best", best.objectives, result.view.quality.name, split)


def adapters(result: SearchResult) -> Iterator[tuple[str, Path]]:
    """Yield digest and folder of each confirmed adapter."""
    for entry in result.view.entries():
        if entry.adapter is not None:
            yield entry.digest, result.folder / entry.adapter


def check_answers(url: str) -> None:
    """Raise a TrackerError if no server answers at a URL, within seconds; any answer will do."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            pass
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise TrackerError(f"nothing answers at {url} ({reason})") from error
