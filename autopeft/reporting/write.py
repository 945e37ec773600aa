"""Writes every file of the report into the output folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autopeft.reporting.front_json import write_front
from autopeft.reporting.front_view import FrontView, view
from autopeft.reporting.html import page
from autopeft.reporting.model_card import report_markdown
from autopeft.reporting.plots import write_plots
from autopeft.reporting.record import RunRecord
from autopeft.reporting.trials_csv import TrialLine, read_trials, trial_lines, write_trials
from autopeft.utils.files import write_text


def write_report(record: RunRecord, folder: Path) -> None:
    """Writes front.json, trials.csv, plots/*.png, report.md and report.html, each in one step.

    Args:
        record: What the search knows.
        folder: The output folder; made if missing.

    Raises:
        OSError: if the folder cannot be written.
    """
    shown = view(record)
    write_front(shown, folder / "front.json")
    write_trials(record, folder / "trials.csv")
    _write(shown, trial_lines(record), folder)


def write_pages(shown: FrontView, folder: Path) -> None:
    """Writes plots, report.md and report.html anew from a front.json and the trials.csv beside it.

    Args:
        shown: What `read_front` gave.
        folder: The output folder, with its trials.csv.

    Raises:
        StorageError: if trials.csv is missing or damaged.
        OSError: if the folder cannot be written.
    """
    _write(shown, read_trials(folder / "trials.csv"), folder)


def _write(shown: FrontView, trials: Sequence[TrialLine], folder: Path) -> None:
    plots = write_plots(shown, trials, folder / "plots")
    write_text(folder / "report.md", report_markdown(shown))
    write_text(folder / "report.html", page(shown, trials, plots))
