"""A map for each member of the front: the method and rank at each site of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from autopeft.plan import ROLES
from autopeft.plan_text import role_word
from autopeft.reporting.columns import badges
from autopeft.reporting.front_view import FrontEntry, FrontView
from autopeft.reporting.style import INK, WHITE, Figure
from autopeft.utils.formatting import human_value

_NO_RANK = "#f0c987"  # sand, which the blue scale of ranks does not contain
_EMPTY = "#eef0f3"


def method_letters(methods: Iterable[str]) -> dict[str, str]:
    """Return a distinct letter for each method, from its name if possible; LoRA has L."""
    letters: dict[str, str] = {}
    for method in sorted(set(methods), key=lambda name: (name != "lora", name)):
        choices = [c for c in method.upper() if c.isalnum()] + list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        letters[method] = next((c for c in choices if c not in letters.values()), "?")
    return letters


def _draw_map(
    axes: Axes,
    entry: FrontEntry,
    title: str,
    roles: list[str],
    n_layers: int,
    letters: dict[str, str],
    colors: ScalarMappable,
) -> None:
    for row in range(len(roles)):
        for layer in range(n_layers):
            axes.add_patch(Rectangle((layer + 0.04, row + 0.04), 0.92, 0.92, color=_EMPTY, lw=0))
    font = min(9.0, 210.0 / n_layers)
    for spec in entry.candidate.plan.specs:
        row = roles.index(spec.role)
        rgba = colors.to_rgba(np.array(spec.rank)) if spec.rank else mpl.colors.to_rgba(_NO_RANK)
        axes.add_patch(Rectangle((spec.layer + 0.04, row + 0.04), 0.92, 0.92, color=rgba, lw=0))
        red, green, blue, _ = (float(part) for part in rgba)
        is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        word = letters[spec.method] + (str(spec.rank) if spec.rank and n_layers <= 16 else "")
        axes.text(
            spec.layer + 0.5,
            row + 0.52,
            word,
            ha="center",
            va="center",
            fontsize=font,
            color=WHITE if is_dark else INK,
        )
    axes.set(xlim=(0, n_layers), ylim=(len(roles), 0))
    stride = max(1, math.ceil(n_layers / 16))
    ticks = list(range(0, n_layers, stride))
    axes.set_xticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks], fontsize=8)
    axes.set_yticks([i + 0.5 for i in range(len(roles))], map(role_word, roles), fontsize=8)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=9, pad=4)


def _title(shown: FrontView, number: int, entry: FrontEntry) -> str:
    words = [human_value(entry.objectives[shown.quality.name], shown.quality.unit)]
    words += [f"{human_value(entry.objectives[c.name], c.unit)} {c.unit}" for c in shown.costs[:1]]
    return f"{number}  {', '.join([*words, *badges(shown, entry)])}"


def site_plot(shown: FrontView) -> Figure:
    """Draw a map for each member of a non-empty front: color for rank, letter for method."""
    plans = [entry.candidate.plan for entry in shown.front]
    specs = [spec for plan in plans for spec in plan.specs]
    used = {spec.role for spec in specs}
    roles = [role for role in ROLES if role in used]
    n_layers = shown.n_layers
    letters = method_letters(spec.method for spec in specs)
    ranks = [spec.rank for spec in specs if spec.rank] or [1]
    scale = mpl.colormaps["Blues"].resampled(256)
    part = mpl.colors.ListedColormap(scale([i / 255 * 0.7 + 0.25 for i in range(256)]))
    top = max(ranks) if max(ranks) > min(ranks) else min(ranks) * 2
    colors = ScalarMappable(LogNorm(min(ranks), top), part)

    n_columns = 1 if n_layers > 16 else 2
    n_rows = math.ceil(len(plans) / n_columns)
    height = n_rows * (0.55 + 0.24 * len(roles)) + 0.9
    figure = Figure(figsize=(8, height), layout=ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.08))
    panels = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axes in panels[len(plans) :]:
        axes.set_axis_off()
    for number, (axes, entry) in enumerate(zip(panels, shown.front, strict=False), start=1):
        _draw_map(axes, entry, _title(shown, number, entry), roles, n_layers, letters, colors)
    legend = ",  ".join(f"{letter} {method}" for method, letter in letters.items())
    sizes = "darker is a higher rank" if len(set(ranks)) > 1 else f"rank {ranks[0]}"
    sand = "; sand: no rank" if any(not spec.rank for spec in specs) else ""
    figure.suptitle(
        "Adapted sites (layers across)", x=0.01, ha="left", fontsize=12, fontweight="bold"
    )
    figure.supxlabel(f"{legend};  {sizes}{sand}", fontsize=9)
    return figure
