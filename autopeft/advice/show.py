"""Advice as text for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from autopeft.advice.advise import Advice, site_grid
from autopeft.advice.measured import Correlation, read_measured
from autopeft.advice.scores import SCORES
from autopeft.reporting.tables import plain_table


def advice_text(advice: Advice) -> RenderableType:
    """Return what was read, the scores with their worth, the ranking, the plan and the command."""
    measured = read_measured()
    scores = plain_table()
    scores.add_column("score", no_wrap=True)
    for name in (*measured.settings, "mean"):
        scores.add_column(name, justify="right", no_wrap=True)
    for name, worth in advice.worths.items():
        cells = (*worth.settings.values(), worth.mean)
        style = "bold" if name == advice.score else ""
        scores.add_row(name, *map(_two_lines, cells), style=style)
    legend = [f"{name}: {setting.title}" for name, setting in measured.settings.items()]
    meanings = [
        f"{name}: {score.meaning}" + (f" ({score.source})" if score.source else "")
        for name, score in SCORES.items()
    ]
    headings, rows = site_grid(advice)
    sites = plain_table()
    for heading in headings:
        sites.add_column(heading, justify="right")
    for row in rows:
        sites.add_row(*row)
    return Group(
        *(Text(line) for line in advice.lines),
        Text(""),
        Text("What the scores told, as rank correlations with the gains of one LoRA at a site"),
        scores,
        Text(
            f"95 % intervals; measured {measured.date} with LoRAs of rank {measured.rank}, on\n"
            + ";\n".join(legend),
            style="dim",
        ),
        Text("; ".join(meanings), style="dim"),
        Text(""),
        Text(advice.why, style="bold"),
        Text("Place of each site of your model:"),
        sites,
        *(Text(line) for line in advice.plan_lines()),
    )


def _two_lines(found: Correlation) -> str:
    value, low, high = (f"{each:+.2f}".replace("0.", ".") for each in found.figures)
    return f"{value}\n{low} {high}"
