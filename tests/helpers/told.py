"""What a search tells a tracker, from first trial to result, without a search."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from report_samples import OBJECTIVES, interrupted, make_record

from autopeft.engine.callback import SearchStart
from autopeft.reporting.front_view import view
from autopeft.result import SearchResult
from autopeft.trial import Trial

RECORD = make_record(20)
COMPLETE, PRUNED, FAILED = (
    next(t for t in RECORD.trials if t.state == state and t.plan.specs)
    for state in ("complete", "pruned", "failed")
)
TOLD = (COMPLETE, PRUNED, FAILED)
STILL_RUNNING = replace(RECORD.trials[-1], number=20, state="running", values={}, rungs=())


def start(folder: Path, *trials: Trial, is_resumed: bool = False, **settings: Any) -> SearchStart:
    """A search in a folder; `trials` ended before it was resumed."""
    known = {"model": "tiny", "objectives": ["trainable_params"], "budget": "5m", "space": None}
    return SearchStart(folder, "told", {**known, **settings}, OBJECTIVES, is_resumed, "1d", trials)


def tell_trials(tracker: Any, *trials: Trial) -> None:
    """All begin, then report, then end: as with several workers."""
    for trial in trials:
        tracker.on_trial_begin(replace(trial, state="running", values={}, rungs=(), reason=""))
    for trial in trials:
        for step, score in trial.rungs:
            tracker.on_rung(trial, step, score)
    for trial in trials:
        tracker.on_trial_end(trial)


def result(folder: Path, *, is_complete: bool = True) -> SearchResult:
    """The files of a result."""
    shown = view(RECORD if is_complete else interrupted(RECORD))
    for entry in shown.entries():
        if entry.adapter is not None:
            (folder / entry.adapter).mkdir(parents=True, exist_ok=True)
            (folder / entry.adapter / "weights.txt").write_text(entry.digest)
    for name in ("report.html", "settings.yaml"):
        (folder / name).write_text(name)
    return SearchResult(folder, shown, "tiny")
