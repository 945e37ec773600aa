"""Draws every plot and writes it: front, curves, where, budget."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from autopeft.report.curves import budget_plot, curves_plot
from autopeft.report.figures import STYLE, png
from autopeft.report.files import write_bytes
from autopeft.report.front_plot import front_plot
from autopeft.report.record import RunRecord
from autopeft.report.view import FrontView, view
from autopeft.report.where import where_plot


def _figures(record: RunRecord, shown: FrontView) -> dict[str, Figure]:
    figures = {}
    for number, cost in enumerate(shown.costs):
        name = "front.png" if number == 0 else f"front_{cost.name}.png"
        figures[name] = front_plot(record, shown, cost)
    figures["curves.png"] = curves_plot(record, shown)
    if shown.front:
        figures["where.png"] = where_plot(record, shown)
    figures["budget.png"] = budget_plot(record)
    return figures


def draw_plots(record: RunRecord) -> dict[str, bytes]:
    """Every plot as PNG by file name; one `front_<cost>.png` more for each further cost.

    There is no where.png if nothing completed.
    """
    with mpl.rc_context(STYLE):
        return {name: png(figure) for name, figure in _figures(record, view(record)).items()}


def write_plots(record: RunRecord, folder: Path) -> dict[str, bytes]:
    """Writes every plot into `folder`, each in one step, and gives them back.

    Raises:
        OSError: if the folder cannot be written.
    """
    plots = draw_plots(record)
    for name, content in plots.items():
        write_bytes(folder / name, content)
    return plots
