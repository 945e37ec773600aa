"""Colors and type of all plots, their figures, and the output as PNG and SVG."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib as mpl
from matplotlib import figure as mpl_figure

# Okabe and Ito's colors: distinct for color-blind readers and in gray.
BLUE, ORANGE, GREEN, RED, GRAY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a8f98"
INK, FAINT, WHITE = "#22262b", "#d9dce1", "#ffffff"

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": GRAY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,  # a "$" in a metric's name is a dollar sign
    "svg.fonttype": "none",  # text stays text: it can be searched and takes the page's font
}

_PAGE_COLORS = {
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GRAY: "var(--gray)",
    INK: "var(--ink)",
    FAINT: "var(--line)",
    WHITE: "var(--card)",
}


class Figure(mpl_figure.Figure):
    """A figure of matplotlib that notebooks show without pyplot, at the size of the files."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        with mpl.rc_context(STYLE):
            content = png(self)
        # Half as wide as it has pixels, so that it is sharp on every screen.
        return content, {"width": int.from_bytes(content[16:20], "big") // 2}


def png(figure: mpl_figure.Figure) -> bytes:
    """Return the figure as PNG. No pyplot, so no backend is chosen for the caller."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=160, facecolor="white")
    return content.getvalue()


def svg(figure: mpl_figure.Figure, name: str) -> str:
    """Return the figure as an SVG element to embed in a page.

    Colors become the page's CSS variables, so that the figure follows a dark theme. Every id starts
    with `name`, so that several figures can share a page.
    """
    text = io.StringIO()
    # A fixed salt and no date: the same figure always gives the same text.
    unset = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata=unset)
    element = text.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", element)
    return re.sub(r"#[0-9a-f]{6}\b", lambda m: _PAGE_COLORS.get(m[0], m[0]), element)
