"""The plot of quality over cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from autopeft.costs.objectives import Objective
from autopeft.reporting.figures import AXIS_WORDS, BLUE, GREY, INK, ORANGE
from autopeft.reporting.front_view import Entry, FrontView
from autopeft.reporting.trials_csv import TrialLine
from autopeft.utils.formatting import human_value


def _cost_axis(axes: Axes, cost: Objective, values: Sequence[float]) -> None:
    """Labels the cost axis; logarithmic where all values allow it."""
    axes.set_xlabel(AXIS_WORDS.get(cost.name, cost.name))
    plain = FuncFormatter(lambda value, _: human_value(value, cost.unit))
    axes.xaxis.set_major_formatter(plain)
    if values and min(values) > 0:
        axes.set_xscale("log")
        is_wide = max(values) > 100 * min(values)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if is_wide else (1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(plain)
        axes.xaxis.set_minor_formatter(NullFormatter())


# Where a number may stand about its point, in typographic points, the nearest and best first.
_OFFSETS = tuple(
    (round(radius * math.cos(angle), 1), round(radius * math.sin(angle), 1))
    for radius in (11, 14, 18, 23, 30)
    for angle in (0.8, 2.3, -0.8, -2.3, 0.4, 2.7, -0.4, -2.7, 0.0, math.pi)
)


def _place_numbers(
    axes: Axes, points: Sequence[tuple[float, float, str]], ink: Sequence[tuple[float, float]]
) -> None:
    """Writes a label beside each point where it covers neither other ink nor another label.

    Args:
        axes: With its limits already final.
        points: (x, y, label) in data units.
        ink: (x, y) of what is drawn already, in data units.
    """
    pixels = [tuple(axes.transData.transform((x, y))) for x, y, _ in points]
    scale = axes.figure.dpi / 72
    taken = [tuple(axes.transData.transform(spot)) for spot in ink]
    for (x, y, label), (px, py) in zip(points, pixels, strict=True):
        best, best_gap = (9.0, 9.0), -1.0
        for dx, dy in _OFFSETS:
            spot = (px + dx * scale, py + dy * scale)
            gap = min((math.dist(spot, other) for other in taken), default=math.inf)
            if gap > best_gap:
                best, best_gap = (dx, dy), gap
            if gap > 8 * scale:
                break
        taken.append((px + best[0] * scale, py + best[1] * scale))
        axes.annotate(
            label,
            (x, y),
            best,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            fontweight="bold",
            color=BLUE,
        )


def _errorbar(
    axes: Axes, entries: Sequence[Entry], shown: FrontView, cost: Objective, **style: Any
) -> None:
    """Points with the quality's 95 % interval."""
    if not entries:
        return
    name = shown.quality.name
    xs = [entry.objectives[cost.name] for entry in entries]
    ys = [entry.objectives[name] for entry in entries]
    pairs = [entry.objectives_ci.get(name) or (y, y) for entry, y in zip(entries, ys, strict=True)]
    low = [max(0.0, y - pair[0]) for y, pair in zip(ys, pairs, strict=True)]
    high = [max(0.0, pair[1] - y) for y, pair in zip(ys, pairs, strict=True)]
    look: dict[str, Any] = {"fmt": "o", "elinewidth": 1.1, "capsize": 2.5, **style}
    axes.errorbar(xs, ys, yerr=[low, high], **look)


def _ink(
    shown: FrontView, cost: Objective, complete: Sequence[TrialLine]
) -> list[tuple[float, float]]:
    """Points along everything a label must not cover: markers, intervals, the front's line."""
    quality = shown.quality.name
    spots = [(o.values[cost.name], o.values[quality]) for o in complete]
    for entry in (*shown.front, *shown.dominated_finalists):
        x, y = entry.objectives[cost.name], entry.objectives[quality]
        low, high = entry.objectives_ci.get(quality) or (y, y)
        spots += [(x, low + (high - low) * i / 24) for i in range(25)]
    for left, right in itertools.pairwise(shown.front):
        x, y = left.objectives[cost.name], left.objectives[quality]
        to_x, to_y = right.objectives[cost.name], right.objectives[quality]
        spots += [(x + (to_x - x) * i / 24, y + (to_y - y) * i / 24) for i in range(25)]
    return [spot for spot in spots if all(map(math.isfinite, spot))]


def _draw_trials(
    axes: Axes, trials: Sequence[TrialLine], shown: FrontView, cost: Objective
) -> None:
    """Every complete trial, faint, LoRA baselines told apart."""
    complete = _complete(trials)
    for is_lora in (False, True):
        trials = [o for o in complete if (o.origin == "baseline") == is_lora]
        if not trials:
            continue
        axes.scatter(
            [o.values[cost.name] for o in trials],
            [o.values[shown.quality.name] for o in trials],
            s=18 if is_lora else 14,
            marker="D" if is_lora else "o",
            color=ORANGE if is_lora else GREY,
            alpha=0.45,
            lw=0,
            label="LoRA baselines (validation)" if is_lora else "trials (validation)",
        )


def _draw_front(axes: Axes, shown: FrontView, cost: Objective) -> None:
    """Finalists with their intervals; the tuned LoRA in its own color, on the front or not."""
    tuned = shown.baseline
    front = [e for e in shown.front if tuned is None or e.digest != tuned.digest]
    dominated = [e for e in _dominated(shown) if tuned is None or e.digest != tuned.digest]
    hollow = {"color": GREY, "mfc": "white", "ms": 5, "label": "dominated finalists"}
    _errorbar(axes, dominated, shown, cost, **hollow)
    axes.plot(
        [e.objectives[cost.name] for e in shown.front],
        [e.objectives[shown.quality.name] for e in shown.front],
        color=BLUE,
        lw=1,
        alpha=0.35,
    )
    label = f"front ({_split(shown.is_confirmed)})"
    _errorbar(axes, front, shown, cost, color=BLUE, ms=6, label=label)
    if tuned is not None:
        label = f"tuned LoRA ({_split(tuned.is_confirmed)})"
        _errorbar(axes, [tuned], shown, cost, fmt="D", color=ORANGE, ms=7, label=label)


def _draw_marks(axes: Axes, shown: FrontView, cost: Objective) -> None:
    """A ring about the pick, a line at the height of no adapter at all."""
    picked = shown.find(shown.best) if shown.best else None
    if picked is not None:
        axes.scatter(
            [picked.objectives[cost.name]],
            [picked.objectives[shown.quality.name]],
            s=190,
            facecolors="none",
            edgecolors=INK,
            lw=1.4,
            label="the pick",
            zorder=5,
        )
    if shown.reference is not None:
        height = shown.reference.objectives[shown.quality.name]
        label = f"no adapter ({_split(shown.reference.is_confirmed)})"
        axes.axhline(height, color=INK, lw=0.9, ls=(0, (4, 3)), label=label)


def _complete(trials: Sequence[TrialLine]) -> list[TrialLine]:
    return [trial for trial in trials if trial.state == "complete" and trial.n_sites]


def _dominated(shown: FrontView) -> list[Entry]:
    return [entry for entry in shown.dominated_finalists if entry.candidate.plan.specs]


def _split(is_confirmed: bool) -> str:
    return "test" if is_confirmed else "validation"


def front_plot(trials: Sequence[TrialLine], shown: FrontView, cost: Objective) -> Figure:
    """Quality over one cost: the front with its intervals, every complete trial faint behind it."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    _draw_trials(axes, trials, shown, cost)
    _draw_front(axes, shown, cost)
    _draw_marks(axes, shown, cost)
    costs = [trial.values[cost.name] for trial in _complete(trials)]
    costs += [entry.objectives[cost.name] for entry in (*shown.front, *_dominated(shown))]
    _cost_axis(axes, cost, [value for value in costs if math.isfinite(value)])
    axes.set_ylabel(f"{shown.quality.name} {shown.quality.unit}".strip())
    axes.set_title(f"{shown.quality.name} against {AXIS_WORDS.get(cost.name, cost.name)}")
    axes.margins(0.06, 0.08)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=4)
    figure.draw_without_rendering()  # settles the limits the labels are placed by
    quality = shown.quality.name
    places = [(e.objectives[cost.name], e.objectives[quality]) for e in shown.front]
    points = [(x, y, str(number)) for number, (x, y) in enumerate(places, start=1)]
    _place_numbers(axes, points, _ink(shown, cost, _complete(trials)))
    return figure
