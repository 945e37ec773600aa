"""The plot of adapters that were scored beside each other: quality over size, with the front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl

from autopeft.costs.objectives import Objective
from autopeft.reporting.columns import full_name
from autopeft.reporting.plots import cost_axis
from autopeft.reporting.style import BLUE, GRAY, INK, STYLE, WHITE, Figure
from autopeft.utils.extremes import bounded


@dataclass(frozen=True)
class Mark:
    """One adapter in the plot; `interval` is that of its quality, None where it has none."""

    name: str
    cost: float
    quality: float
    interval: tuple[float, float] | None
    is_on_front: bool


def comparison_plot(
    marks: Sequence[Mark], quality: Objective, cost: Objective, *, base: float | None = None
) -> Figure:
    """Draw each adapter with its interval and its name, and the line of the front.

    Args:
        marks: The adapters.
        quality: What the vertical axis shows.
        cost: What the horizontal one shows.
        base: The base model's quality, drawn as a line; None: not compared.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(f"{quality.name} against {full_name(cost.name)}")
        axes.set_ylabel(f"{quality.name} {quality.unit}".strip())
        axes.margins(0.12, 0.12)
        cost_axis(axes, cost, [mark.cost for mark in marks])
        front = sorted((mark for mark in marks if mark.is_on_front), key=lambda mark: mark.cost)
        line = bounded([mark.quality for mark in front])
        axes.plot([mark.cost for mark in front], line, color=BLUE, lw=1, alpha=0.35)
        for mark in marks:
            y = float(bounded(mark.quality))
            low, high = bounded(mark.interval or (y, y)).tolist()
            ends = [[max(0.0, y - low)], [max(0.0, high - y)]]
            color = BLUE if mark.is_on_front else GRAY
            fill = BLUE if mark.is_on_front else WHITE
            axes.errorbar(
                [mark.cost], [y], yerr=ends, fmt="o", color=color, mfc=fill, ms=8, capsize=2.5
            )
            place: dict[str, Any] = {"xytext": (7, 5), "textcoords": "offset points"}
            axes.annotate(mark.name, (mark.cost, y), fontsize=8, color=INK, **place)
        if base is not None:
            height = float(bounded(base))
            axes.axhline(height, color=INK, lw=0.9, ls=(0, (4, 3)), label="no adapter")
            figure.legend(loc="outside lower center")
    return figure
