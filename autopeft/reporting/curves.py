"""The plots of what a search did: scores at the rungs, and where the time went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from autopeft.reporting.figures import BLUE, GREEN, GREY, RED
from autopeft.reporting.front_view import FrontView
from autopeft.reporting.record import BudgetReport
from autopeft.reporting.trials_csv import TrialLine
from autopeft.utils.formatting import human_seconds


def _floor(scores: Sequence[float]) -> float | None:
    """Where the axis of scores ends, so that a few diverged trials do not flatten all the others.

    None where no score lies far below the lowest tenth.
    """
    ordered = sorted(score for score in scores if math.isfinite(score))
    if len(ordered) < 10:
        return None
    tenth = ordered[len(ordered) // 10]
    floor = tenth - (ordered[-1] - tenth)
    return floor if ordered[0] < floor else None


def curves_plot(trials: Sequence[TrialLine], shown: FrontView) -> Figure:
    """The score at each rung: front members strong, pruned trials end in a cross."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    members = {entry.digest for entry in shown.front}
    looks: dict[str, dict[str, Any]] = {
        "pruned": {"color": GREY, "lw": 0.8, "alpha": 0.7, "label": "pruned"},
        "failed": {"color": RED, "lw": 0.8, "alpha": 0.9, "label": "failed"},
        "complete": {"color": GREEN, "lw": 0.9, "alpha": 0.55, "label": "complete"},
        "front": {"color": BLUE, "lw": 2.0, "alpha": 0.95, "label": "on the front"},
    }
    steps: set[int] = set()
    for kind, look in looks.items():
        label = look.pop("label")
        for trial in trials:
            is_member = trial.digest in members
            if not trial.rungs or kind != ("front" if is_member else trial.state):
                continue
            xs = [step for step, _ in trial.rungs]
            steps.update(xs)
            axes.plot(
                xs,
                [score for _, score in trial.rungs],
                marker="x" if kind in ("pruned", "failed") else "o",
                markevery=[-1],
                ms=5 if kind in ("pruned", "failed") else 3.5,
                label=label,
                **look,
            )
            label = None
    is_loss = shown.quality.direction == "maximize"
    axes.set_ylabel("minus the validation loss" if is_loss else shown.quality.name)
    axes.set_xlabel("optimizer steps")
    scores = [score for trial in trials for _, score in trial.rungs]
    axes.set_ylim(bottom=_floor(scores))
    axes.set_title("What each trial said at its rungs")
    if steps:
        axes.set_xscale("log")
        axes.set_xticks(sorted(steps), [str(step) for step in sorted(steps)])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def _bars(axes: Axes, title: str, parts: Mapping[str, float], color: str) -> None:
    names = list(parts)[::-1]
    seconds = [parts[name] for name in names]
    total = sum(seconds) or 1.0
    axes.barh(names, seconds, color=color, height=0.62)
    for row, value in enumerate(seconds):
        text = f" {human_seconds(value)}  ({value / total:.0%})"
        axes.text(value, row, text, va="center", fontsize=9)
    axes.set_title(title)
    axes.set_xlim(0, max(seconds, default=1.0) * 1.28 or 1.0)
    axes.grid(False)
    axes.spines[["bottom"]].set_visible(False)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)


def budget_plot(budget: BudgetReport) -> Figure:
    """Wall-clock seconds by phase, and the workers' seconds by activity."""
    panels = [
        (f"Wall clock: {human_seconds(budget.spent_seconds)}", budget.phases, BLUE),
        ("Workers, all together", budget.worker_seconds, GREEN),
    ]
    panels = [panel for panel in panels if panel[1]]
    sizes = [len(parts) + 1.2 for _, parts, _ in panels] or [1.0]
    figure = Figure(figsize=(8, max(1.5, 0.36 * sum(sizes))), layout="constrained")
    if not panels:
        return figure
    grid = figure.add_gridspec(len(panels), 1, height_ratios=sizes)
    for row, (title, parts, color) in enumerate(panels):
        _bars(figure.add_subplot(grid[row]), title, parts, color)
    return figure
