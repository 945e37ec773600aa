"""Write every file of the report into the output folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from autopeft.reporting.converted import Converted, read_converted, weights_of
from autopeft.reporting.front_json import write_front
from autopeft.reporting.front_view import FrontView
from autopeft.reporting.trials_csv import trials_csv
from autopeft.trial import Trial
from autopeft.utils.files import contained, write_bytes, write_text


def with_converted(shown: FrontView, folder: Path) -> FrontView:
    """Return the view with what `converted.json` of a search's folder tells of its saved weights.

    A search that is resumed may save those of another seed; what was scored before is outdated.
    """
    adapters = {entry.digest: entry.adapter for entry in shown.entries()}
    current: list[Converted] = []
    outdated: list[Converted] = []
    for each in read_converted(folder):
        place = adapters.get(each.digest)
        is_same = place is not None and each.weights == weights_of(contained(folder, place))
        (current if is_same else outdated).append(each)
    return replace(shown, converted=tuple(current), outdated=tuple(outdated))


def write_report(shown: FrontView, trials: Sequence[Trial], folder: Path) -> FrontView:
    """Write front.json, trials.csv, plots/*.png and report.html into the folder.

    Returns:
        The view, with what `converted.json` there holds.
    """
    shown = with_converted(shown, folder)
    write_front(shown, folder / "front.json")
    write_text(folder / "trials.csv", trials_csv(trials, shown.objectives))
    write_pages(shown, trials, folder)
    return shown


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
