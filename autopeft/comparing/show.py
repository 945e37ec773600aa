"""A comparison as text for the terminal, as JSON, and as a plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from autopeft.comparing.compare import UNTRAINED, AdapterComparison, Entry, size_name
from autopeft.comparing.judging import LEVELS, ONE_SEED, Judgement
from autopeft.comparing.recorded import TableJudgement
from autopeft.confirm.intervals import Interval
from autopeft.costs.objectives import COSTS, QUALITIES, Objective
from autopeft.reporting.tables import plain_table
from autopeft.utils.files import write_bytes, write_text
from autopeft.utils.formatting import human_bytes, human_count
from autopeft.utils.pareto import non_dominated
from autopeft.utils.serialize import strict_json, to_plain


def comparison_text(found: AdapterComparison) -> RenderableType:
    """Return what was scored, the entries with their costs, and the verdict."""
    table = plain_table()
    table.add_column("", no_wrap=True)
    table.add_column("adapter", overflow="fold")
    further = [each.name for each in found.further]
    first = (found.objective.name, "95 % interval", *further)
    for heading in (*first, "params", "file", "peak memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in found.entries:
        table.add_row("*" if entry.is_on_front else "", entry.name, *_cells(entry, further))
    notes = [f"{e.name}: {'; '.join(filter(None, (e.method, e.note)))}" for e in found.entries]
    return Group(
        *(Text(line) for line in found.lines),
        table,
        *(Text(note, style="dim") for note in notes),
        Text(f"* on the front of {_joined(('quality', 'size', *further))}", style="dim"),
        *_verdict(found.judgement.headline, found.judgement.lines, (LEVELS, ONE_SEED)),
        *(Text(line) for line in further_lines(found)),
        *(Text(remark, style="dim") for remark in _over_base(found)),
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


OVER_BASE = (
    "forgetting is over the base model, paired with it by rows; its intervals hold for all "
    "adapters at once"
)
"""How forgetting is to be read."""


def further_lines(found: AdapterComparison) -> list[str]:
    """Return each further quality of each entry in a line; what is over the base, of adapters."""
    lines = []
    for quality in found.further:
        is_over_base = quality.name in QUALITIES
        for entry in found.entries:
            told = entry.further[quality.name]
            if is_over_base and entry.kind == "base":
                continue
            sign = "+" if is_over_base else ""
            text = f"{quality.name} of {entry.name}: {told.value:{sign}.4f}"
            if told.interval is not None:
                low, high = told.interval
                text += f" ({low:{sign}.4f} to {high:{sign}.4f})"
                if is_over_base:
                    text += ": shown" if low > 0 or high < 0 else ": not shown"
            lines.append(text)
    return lines


def _over_base(found: AdapterComparison) -> list[str]:
    return [OVER_BASE for quality in found.further if quality.name in QUALITIES]


def _joined(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}"


def _cells(entry: Entry, further: Sequence[str]) -> list[str]:
    params = entry.trainable_params
    others = [entry.further[name] for name in further]
    return [
        f"{entry.quality:.4f}",
        _ends(entry.interval),
        *(f"{each.value:.4f}" for each in others),
        "-" if params is None else human_count(params),
        human_bytes(entry.file_bytes) if entry.file_bytes else "-",
        "-" if entry.price is None else human_bytes(entry.price.peak_memory_bytes),
    ]


def _ends(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def write_comparison(found: AdapterComparison, folder: Path) -> None:
    """Write `compare.json`, `compare.png`, and `compare_NAME.png` for each further quality."""
    write_text(folder / "compare.json", strict_json(comparison_json(found)))
    write_bytes(folder / "compare.png", comparison_png(found))
    for quality in found.further:
        write_bytes(folder / f"compare_{quality.name}.png", further_png(found, quality))


def comparison_json(found: AdapterComparison) -> dict[str, Any]:
    """Return a comparison as plain data."""
    return {
        "schema": 1,
        "objective": {"name": found.objective.name, "direction": found.objective.direction},
        "rows": {"source": found.source, "n": found.n_rows},
        "lines": list(found.lines),
        "entries": to_plain(found.entries),
        **_judgement_json(found.judgement, found.judgement.lines),
        "further": [{"name": o.name, "direction": o.direction} for o in found.further],
        "further_lines": further_lines(found),
        "remarks": [LEVELS, ONE_SEED, *_over_base(found)],
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
    name = size_name(found.entries)
    cost = COSTS["trainable_params" if name == "trainable_params" else "adapter_bytes"]
    return _png(found, cost, lambda entry: float(getattr(entry, name)))


def further_png(found: AdapterComparison, further: Objective) -> bytes:
    """Return the front of quality over a further quality as a PNG."""
    return _png(found, further, lambda entry: entry.further[further.name].value)


def _png(found: AdapterComparison, over: Objective, place: Callable[[Entry], float]) -> bytes:
    """Return quality over something else, with the front of the two."""
    from autopeft.reporting.comparison_plot import Mark, comparison_plot
    from autopeft.reporting.style import png

    quality, sign = found.objective, found.objective.sign()
    points = [
        [sign * e.quality, over.sign() * place(e)] if e.note != UNTRAINED else [math.nan] * 2
        for e in found.entries
    ]
    marks = [
        Mark(entry.name, place(entry), entry.quality, entry.interval, bool(is_on_front))
        for entry, is_on_front in zip(found.entries, non_dominated(points), strict=True)
        if entry.kind != "base"
    ]
    base = next((e.quality for e in found.entries if e.kind == "base" and not e.note), None)
    return png(comparison_plot(marks, quality, over, base=base))
