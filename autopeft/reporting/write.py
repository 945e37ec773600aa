"""Write every file of the report into the output folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autopeft.reporting.front_json import write_front
from autopeft.reporting.front_view import FrontView
from autopeft.reporting.trials_csv import read_trials, write_trials
from autopeft.trial import Trial
from autopeft.utils.files import write_bytes, write_text


def write_report(shown: FrontView, trials: Sequence[Trial], folder: Path) -> None:
    """Write front.json, trials.csv, plots/*.png and report.html.

    Args:
        shown: The view of the search.
        trials: Every finished trial, by number.
        folder: The output folder; made if missing.

    Raises:
        OSError: if the folder cannot be written.
    """
    write_front(shown, folder / "front.json")
    write_trials(trials, shown.objectives, folder / "trials.csv")
    _write_pages(shown, trials, folder)


def write_pages(shown: FrontView, folder: Path) -> None:
    """Write plots and report.html again, from front.json and the trials.csv beside it.

    Args:
        shown: What `read_front` returned.
        folder: The output folder, with its trials.csv.

    Raises:
        StorageError: if trials.csv is missing or damaged.
        OSError: if the folder cannot be written.
    """
    _write_pages(shown, read_trials(folder / "trials.csv"), folder)


def _write_pages(shown: FrontView, trials: Sequence[Trial], folder: Path) -> None:
    # Imported here: a search should not wait for matplotlib before it starts.
    from autopeft.reporting.html import page
    from autopeft.reporting.plots import draw_plots

    plots = draw_plots(shown, trials)
    for plot in plots:
        write_bytes(folder / "plots" / f"{plot.name}.png", plot.png)
    write_text(folder / "report.html", page(shown, trials, plots))
