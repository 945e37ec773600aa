"""A comparison as text for the terminal, as JSON, and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from autopeft.comparing.compare import AdapterComparison, Entry, size_name
from autopeft.comparing.judging import LEVELS, ONE_SEED, Judgement
from autopeft.comparing.recorded import TableJudgement
from autopeft.costs.objectives import COSTS
from autopeft.reporting.tables import plain_table
from autopeft.utils.files import write_bytes, write_text
from autopeft.utils.formatting import human_bytes, human_count
from autopeft.utils.serialize import strict_json, to_plain


def comparison_text(found: AdapterComparison) -> RenderableType:
    """Return what was scored, the entries with their costs, and the verdict."""
    table = plain_table()
    table.add_column("", no_wrap=True)
    table.add_column("adapter", overflow="fold")
    for heading in (found.objective.name, "95 % interval", "params", "file", "peak memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in found.entries:
        table.add_row("*" if entry.is_on_front else "", entry.name, *_cells(entry))
    notes = [f"{e.name}: {'; '.join(filter(None, (e.method, e.note)))}" for e in found.entries]
    return Group(
        *(Text(line) for line in found.lines),
        table,
        *(Text(note, style="dim") for note in notes),
        Text("* on the front of quality and size", style="dim"),
        *_verdict(found.judgement.headline, found.judgement.lines, (LEVELS, ONE_SEED)),
    )


def table_text(found: TableJudgement) -> RenderableType:
    """Return what a recorded table shows."""
    headline = found.judgement.headline
    return Group(*map(Text, found.lines), *_verdict(headline, found.verdict, found.remarks))


def _verdict(headline: str, lines: Sequence[str], remarks: Sequence[str]) -> list[Text]:
    """Return the headline, the pairs, and how to read them."""
    return [
        Text(""),
        Text(headline, style="bold"),
        *map(Text, lines),
        *(Text(remark, style="dim") for remark in remarks),
    ]


def _cells(entry: Entry) -> list[str]:
    low_high = entry.interval and f"{entry.interval[0]:.3f} to {entry.interval[1]:.3f}"
    params = entry.trainable_params
    return [
        f"{entry.quality:.4f}",
        low_high or "-",
        "-" if params is None else human_count(params),
        human_bytes(entry.file_bytes) if entry.file_bytes else "-",
        "-" if entry.price is None else human_bytes(entry.price.peak_memory_bytes),
    ]


def write_comparison(found: AdapterComparison, folder: Path) -> None:
    """Write `compare.json` and `compare.png`."""
    write_text(folder / "compare.json", strict_json(comparison_json(found)))
    write_bytes(folder / "compare.png", comparison_png(found))


def comparison_json(found: AdapterComparison) -> dict[str, Any]:
    """Return a comparison as plain data."""
    return {
        "schema": 1,
        "objective": {"name": found.objective.name, "direction": found.objective.direction},
        "rows": {"source": found.source, "n": found.n_rows},
        "lines": list(found.lines),
        "entries": to_plain(found.entries),
        **_judgement_json(found.judgement, found.judgement.lines),
        "remarks": [LEVELS, ONE_SEED],
    }


def _judgement_json(judgement: Judgement, lines: Sequence[str]) -> dict[str, Any]:
    return {
        "headline": judgement.headline,
        "verdict": list(lines),
        "pairs": to_plain(judgement.pairs),
    }


def write_table(found: TableJudgement, folder: Path) -> None:
    """Write the judgement of a recorded table to `compare.json`."""
    row = {
        "schema": 1,
        "lines": list(found.lines),
        "seed_sd": found.seed_sd,
        **_judgement_json(found.judgement, found.verdict),
        "remarks": list(found.remarks),
    }
    write_text(folder / "compare.json", strict_json(row))


def comparison_png(found: AdapterComparison) -> bytes:
    """Return the front of quality over size as a PNG."""
    from autopeft.reporting.comparison_plot import Mark, comparison_plot
    from autopeft.reporting.style import png

    name = size_name(found.entries)
    marks = [
        Mark(e.name, float(getattr(e, name)), e.quality, e.interval, e.is_on_front)
        for e in found.entries
        if e.kind != "base"
    ]
    base = next((e.quality for e in found.entries if e.kind == "base" and not e.note), None)
    cost = COSTS["trainable_params" if name == "trainable_params" else "adapter_bytes"]
    return png(comparison_plot(marks, found.objective, cost, base=base))
