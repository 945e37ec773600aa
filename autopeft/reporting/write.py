"""Write every file of the report into the output folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autopeft.reporting.front_json import write_front
from autopeft.reporting.front_view import FrontView
from autopeft.reporting.trials_csv import trials_csv
from autopeft.trial import Trial
from autopeft.utils.files import contained, write_bytes, write_text


def write_report(shown: FrontView, trials: Sequence[Trial], folder: Path) -> None:
    """Write front.json, trials.csv, plots/*.png and report.html into the folder."""
    write_front(shown, folder / "front.json")
    write_text(folder / "trials.csv", trials_csv(trials, shown.objectives))
    write_pages(shown, trials, folder)


def write_pages(shown: FrontView, trials: Sequence[Trial], folder: Path) -> None:
    """Write plots/*.png and report.html."""
    # Imported here: a search should not wait for matplotlib before it starts.
    from autopeft.reporting.html import page
    from autopeft.reporting.plots import draw_plots

    place = contained(folder, "plots")
    plots = draw_plots(shown, trials)
    for plot in plots:
        write_bytes(place / f"{plot.name}.png", plot.png)
    write_text(folder / "report.html", page(shown, trials, plots))
