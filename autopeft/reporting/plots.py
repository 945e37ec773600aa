"""Draws every plot and writes it: front, curves, where, budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from autopeft.reporting.curves import budget_plot, curves_plot
from autopeft.reporting.figures import STYLE, png
from autopeft.reporting.front_plot import front_plot
from autopeft.reporting.front_view import FrontView
from autopeft.reporting.sites_map import where_plot
from autopeft.reporting.trials_csv import TrialLine
from autopeft.utils.files import write_bytes


def _figures(shown: FrontView, trials: Sequence[TrialLine]) -> dict[str, Figure]:
    figures = {}
    for number, cost in enumerate(shown.costs):
        name = "front.png" if number == 0 else f"front_{cost.name}.png"
        figures[name] = front_plot(trials, shown, cost)
    figures["curves.png"] = curves_plot(trials, shown)
    if shown.front:
        figures["where.png"] = where_plot(shown)
    figures["budget.png"] = budget_plot(shown.budget)
    return figures


def draw_plots(shown: FrontView, trials: Sequence[TrialLine]) -> dict[str, bytes]:
    """Every plot as PNG by file name; one `front_<cost>.png` more for each further cost.

    There is no where.png if the front is empty.
    """
    with mpl.rc_context(STYLE):
        return {name: png(figure) for name, figure in _figures(shown, trials).items()}


def write_plots(shown: FrontView, trials: Sequence[TrialLine], folder: Path) -> dict[str, bytes]:
    """Writes every plot into `folder`, each in one step, and gives them back.

    Raises:
        OSError: if the folder cannot be written.
    """
    plots = draw_plots(shown, trials)
    for name, content in plots.items():
        write_bytes(folder / name, content)
    return plots
