"""What every plot shares: colors, type, and the way to PNG."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colors: told apart by color-blind readers and in gray.
BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a8f98"
INK, FAINT = "#22262b", "#d9dce1"

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": GREY,
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
    "text.parse_math": False,  # a "$" in a metric's name is a dollar
}

AXIS_WORDS = {
    "trainable_params": "trainable parameters",
    "adapter_bytes": "adapter size",
    "train_flops": "training FLOPs",
    "peak_memory_bytes": "peak training memory",
    "train_seconds": "training time",
    "latency_ms": "latency",
}


def png(figure: Figure) -> bytes:
    """The figure as PNG. No pyplot: nothing stays open and no backend is chosen for the caller."""
    FigureCanvasAgg(figure)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=160, facecolor="white")
    return content.getvalue()
