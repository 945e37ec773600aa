"""The plots of a search: the front, the scores at the rungs, the adapted sites, the time.

Every plot is written as PNG; the page embeds the fronts as SVG, whose members have ids that its
script looks for. A notebook gets them as figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from autopeft.costs.objectives import Objective
from autopeft.errors import SettingsError
from autopeft.reporting.columns import full_name, split_name
from autopeft.reporting.front_view import FrontEntry, FrontView
from autopeft.reporting.record import BudgetReport
from autopeft.reporting.site_plot import site_plot
from autopeft.reporting.style import (
    BLUE,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    RED,
    STYLE,
    WHITE,
    Figure,
    png,
    svg,
)
from autopeft.trial import Trial
from autopeft.utils.extremes import bounded
from autopeft.utils.formatting import human_seconds, human_value


@dataclass(frozen=True)
class Plot:
    """One plot, drawn; `svg`, an element for the page, is empty for all but the fronts."""

    name: str
    caption: str
    png: bytes
    svg: str = ""


@dataclass(frozen=True)
class Drawing:
    """One plot, not drawn yet; call `figure` under `STYLE`."""

    caption: str
    figure: Callable[[], Figure]


def drawings(shown: FrontView, trials: Sequence[Trial]) -> dict[str, Drawing]:
    """Return every plot by name: a front for each cost, then curves, sites and budget.

    There is no plot of sites if the front is empty.
    """
    result = {}
    for number, cost in enumerate(shown.costs):
        name = "front" if number == 0 else f"front_{cost.name}"
        caption = f"{shown.quality.name} against {full_name(cost.name, shown.settings)}"
        result[name] = Drawing(caption, partial(front_plot, trials, shown, cost))
    caption = "Score at each rung. A cross ends a trial that was pruned or failed."
    result["curves"] = Drawing(caption, lambda: curves_plot(trials, shown))
    if shown.front:
        caption = "Adapted sites of each member of the front."
        result["where"] = Drawing(caption, lambda: site_plot(shown))
    caption = "Time by phase and by activity."
    result["budget"] = Drawing(caption, lambda: budget_plot(shown.budget))
    return result


def draw_plots(shown: FrontView, trials: Sequence[Trial]) -> list[Plot]:
    """Draw every plot, each once; the fronts as SVG too."""
    plots = []
    with mpl.rc_context(STYLE):
        for name, drawing in drawings(shown, trials).items():
            figure = drawing.figure()
            page = svg(figure, name) if name.startswith("front") else ""
            plots.append(Plot(name, drawing.caption, png(figure), page))
    return plots


def draw_figure(shown: FrontView, trials: Sequence[Trial], name: str) -> Figure:
    """Draw one plot, which shows itself in a notebook as it looks in the files.

    Raises:
        SettingsError: if there is no such plot.
    """
    known = drawings(shown, trials)
    if name not in known:
        raise SettingsError("plot", name, "no such plot", f"use one of {', '.join(known)}")
    with mpl.rc_context(STYLE):
        return known[name].figure()


def front_plot(trials: Sequence[Trial], shown: FrontView, cost: Objective) -> Figure:
    """Draw quality over one cost: the front with its intervals, complete trials faint behind it.

    The marker of each entry has the id `entry-<digest>`.
    """
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(f"{shown.quality.name} against {full_name(cost.name).partition(':')[0]}")
    axes.set_ylabel(f"{shown.quality.name} {shown.quality.unit}".strip())
    axes.margins(0.06, 0.08)
    seen = _draw_trials(axes, trials, shown.quality, cost)
    entries = [e for e in (*shown.front, *shown.dominated_finalists) if e.candidate.plan.specs]
    values = [*seen, *(entry.objectives[cost.name] for entry in entries)]
    cost_axis(axes, cost, values, label=full_name(cost.name, shown.settings))
    _draw_front(axes, shown, cost)
    _draw_converted(axes, shown, cost)
    if shown.reference is not None:
        label = f"no adapter ({split_name(shown, shown.reference.is_confirmed)})"
        height = float(bounded(shown.reference.objectives[shown.quality.name]))
        axes.axhline(height, color=INK, lw=0.9, ls=(0, (4, 3)), label=label, gid="reference")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def cost_axis(axes: Axes, cost: Objective, values: Sequence[float], label: str = "") -> None:
    """Label the cost axis; make it logarithmic where all values are positive."""
    axes.set_xlabel(label or full_name(cost.name))
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0:
        axes.set_xscale("log")
        if min(finite) == max(finite):  # A scale from one cost to itself is none.
            axes.set_xlim(finite[0] / 2, finite[0] * 2)
        is_wide = max(finite) > 100 * min(finite)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if is_wide else (1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_value(value, cost.unit)))


def _draw_trials(
    axes: Axes, trials: Sequence[Trial], quality: Objective, cost: Objective
) -> list[float]:
    """Draw every complete trial with an adapter, LoRA baselines apart; return their costs."""
    costs: list[float] = []
    for is_lora in (False, True):
        points = [
            (trial.values.get(cost.name, math.nan), trial.values.get(quality.name, math.nan))
            for trial in trials
            if trial.state == "complete"
            and trial.plan.specs
            and (trial.origin == "baseline") == is_lora
        ]
        if not points:
            continue
        xs, ys = bounded(points).T.tolist()
        costs += xs
        axes.scatter(
            xs,
            ys,
            s=18 if is_lora else 14,
            marker="D" if is_lora else "o",
            color=ORANGE if is_lora else GRAY,
            alpha=0.45,
            lw=0,
            label="LoRA baselines (validation)" if is_lora else "trials (validation)",
            gid="baselines" if is_lora else "trials",
        )
    return costs


def _draw_front(axes: Axes, shown: FrontView, cost: Objective) -> None:
    """Draw the front's line and each finalist; the tuned LoRA has its own color."""
    quality, tuned = shown.quality.name, shown.baseline
    xs = bounded([entry.objectives[cost.name] for entry in shown.front])
    ys = bounded([entry.objectives[quality] for entry in shown.front])
    axes.plot(xs, ys, color=BLUE, lw=1, alpha=0.35, gid="front-line")
    numbers = {entry.digest: str(number) for number, entry in enumerate(shown.front, start=1)}
    entries = {e.digest: e for e in (*shown.dominated_finalists, *shown.front)}
    if tuned is not None:
        entries.setdefault(tuned.digest, tuned)
    labeled: set[str] = set()
    for order, entry in enumerate(e for e in entries.values() if e.candidate.plan.specs):
        number = numbers.get(entry.digest, "")
        look: dict[str, Any] = {"color": BLUE, "ms": 13}
        label = f"front ({split_name(shown, shown.is_confirmed)})"
        if tuned is not None and entry.digest == tuned.digest:
            look = {"color": ORANGE, "fmt": "D", "ms": 12}
            label = f"tuned LoRA ({split_name(shown, tuned.is_confirmed)})"
        elif not number:
            look = {"color": GRAY, "mfc": WHITE, "ms": 6}
            label = "dominated finalists"
        # Each number is drawn over its own marker and below the next one, which may cover both.
        height = 3.0 + order
        name = label if label not in labeled else None
        _draw_entry(axes, entry, quality, cost, zorder=height, label=name, **look)
        labeled.add(label)
        x, y = bounded([entry.objectives[cost.name], entry.objectives[quality]]).tolist()
        if entry.digest == shown.best:
            ring: dict[str, Any] = {"facecolors": "none", "edgecolors": INK, "lw": 1.4}
            axes.scatter([x], [y], s=330, label="the pick", zorder=height, gid="pick", **ring)
        if number and math.isfinite(x) and math.isfinite(y):
            font: dict[str, Any] = {"fontsize": 8, "fontweight": "bold", "color": WHITE}
            place: dict[str, Any] = {"ha": "center", "va": "center_baseline"}
            axes.text(x, y, number, zorder=height + 0.5, **place, **font)


def _draw_converted(axes: Axes, shown: FrontView, cost: Objective) -> None:
    """Draw members as they were exported as hollow squares, at the cost of the member itself."""
    labeled: set[bool] = set()
    for number, form in enumerate(shown.converted):
        entry = shown.find(form.digest)
        if entry is None:
            continue
        place = [entry.objectives[cost.name], form.value(shown.quality)]
        x, y = bounded(place).tolist()
        label = "as exported, lossy" if form.lossy else "as exported"
        name = None if form.lossy in labeled else label
        color = RED if form.lossy else GREEN
        look: dict[str, Any] = {"marker": "s", "facecolors": "none", "s": 90, "lw": 1.6}
        gid = f"converted-{number}-{form.digest}"
        axes.scatter([x], [y], edgecolors=color, label=name, zorder=99, gid=gid, **look)
        labeled.add(form.lossy)


def _draw_entry(axes: Axes, entry: FrontEntry, quality: str, cost: Objective, **look: Any) -> None:
    """Draw one entry as a marker with its 95 % interval."""
    x, y = bounded([entry.objectives[cost.name], entry.objectives[quality]]).tolist()
    low, high = bounded(entry.objectives_ci.get(quality) or (y, y)).tolist()
    ends = [[max(0.0, y - low)], [max(0.0, high - y)]]
    style: dict[str, Any] = {"fmt": "o", "elinewidth": 1.1, "capsize": 2.5, **look}
    marker, _, _ = axes.errorbar([x], [y], yerr=ends, **style)
    marker.set_gid(f"entry-{entry.digest}")


def curves_plot(trials: Sequence[Trial], shown: FrontView) -> Figure:
    """Draw the score at each rung: front members bold, pruned and failed trials end in a cross."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    members = {entry.digest for entry in shown.front}
    kinds = {trial.number: "front" if trial.digest in members else trial.state for trial in trials}
    looks: dict[str, dict[str, Any]] = {
        "pruned": {"color": GRAY, "lw": 0.8, "alpha": 0.7, "marker": "x", "ms": 5},
        "failed": {"color": RED, "lw": 0.8, "alpha": 0.9, "marker": "x", "ms": 5},
        "complete": {"color": GREEN, "lw": 0.9, "alpha": 0.55, "marker": "o", "ms": 3.5},
        "front": {"color": BLUE, "lw": 2.0, "alpha": 0.95, "marker": "o", "ms": 3.5},
    }
    for kind, look in looks.items():
        label: str | None = "on the front" if kind == "front" else kind
        for trial in trials:
            if trial.rungs and kinds[trial.number] == kind:
                steps, scores = zip(*trial.rungs, strict=True)
                axes.plot(steps, bounded(scores), markevery=[-1], label=label, **look)
                label = None
    # A training function of the user's reports what it likes, in the direction of its metric.
    is_loss = shown.quality.direction == "maximize" and not shown.settings.get("evaluate")
    axes.set_ylabel("minus the validation loss" if is_loss else shown.quality.name)
    axes.set_xlabel("optimizer steps")
    axes.set_ylim(bottom=_floor([score for trial in trials for _, score in trial.rungs]))
    axes.set_title("Score at each rung")
    all_steps = sorted({step for trial in trials for step, _ in trial.rungs})
    if all_steps:
        axes.set_xscale("log")
        axes.set_xticks(all_steps, [str(step) for step in all_steps])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def _floor(scores: Sequence[float]) -> float | None:
    """Return a lower limit for the score axis, or None if no score lies far below the others."""
    ordered = sorted(bounded([score for score in scores if math.isfinite(score)]).tolist())
    if len(ordered) < 10:
        return None
    tenth = ordered[len(ordered) // 10]
    floor = tenth - (ordered[-1] - tenth)
    return floor if ordered[0] < floor else None


def budget_plot(budget: BudgetReport) -> Figure:
    """Draw wall-clock seconds by phase, and worker seconds by activity."""
    panels = [
        (f"Wall clock: {human_seconds(budget.spent_seconds)}", budget.phases, BLUE),
        ("All workers together", budget.worker_seconds, GREEN),
    ]
    panels = [panel for panel in panels if panel[1]]
    sizes = [len(parts) + 1.2 for _, parts, _ in panels] or [1.0]
    figure = Figure(figsize=(8, max(1.5, 0.36 * sum(sizes))), layout="constrained")
    if not panels:
        return figure
    grid = figure.add_gridspec(len(panels), 1, height_ratios=sizes)
    for row, (title, parts, color) in enumerate(panels):
        _draw_bars(figure.add_subplot(grid[row]), title, parts, color)
    return figure


def _draw_bars(axes: Axes, title: str, parts: Mapping[str, float], color: str) -> None:
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
