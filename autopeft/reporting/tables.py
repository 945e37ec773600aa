"""Tables for the terminal: verdict, front, budget; legible at 80 columns and without color."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autopeft.confirm.verdict import LevelVerdict
from autopeft.costs.objectives import Objective
from autopeft.costs.price import PriceList
from autopeft.plan_text import plan_summary
from autopeft.reporting.front_view import Entry, FrontView, view
from autopeft.reporting.record import BudgetReport, RunRecord
from autopeft.utils.formatting import human_count, human_seconds, human_value

__all__ = ["budget_table", "front_table", "plan_summary", "summary"]

_HEADINGS = {
    "trainable_params": "params",
    "adapter_bytes": "size",
    "train_flops": "FLOPs",
    "peak_memory_bytes": "memory",
    "train_seconds": "time",
    "latency_ms": "latency",
}


def heading(name: str) -> str:
    """A column's short heading."""
    return _HEADINGS.get(name, name)


def with_margin(entry: Entry, objective: Objective) -> str:
    """A value and half the width of its interval, such as 0.823 ±0.011."""
    value = human_value(entry.objectives[objective.name], objective.unit)
    interval = entry.objectives_ci.get(objective.name)
    if interval is None or objective.is_known:
        return value
    half = (interval[1] - interval[0]) / 2
    return f"{value} ±{human_value(half, objective.unit)}"


def quality_text(shown: FrontView, entry: Entry) -> str:
    """The quality; says so where it is of the validation split among numbers of the test split."""
    text = with_margin(entry, shown.quality)
    return f"{text} (val)" if shown.is_confirmed and not entry.is_confirmed else text


def marks(shown: FrontView, entry: Entry) -> str:
    """A member's number, cheapest first, then an asterisk for the pick, L for the tuned LoRA."""
    digests = [member.digest for member in shown.front]
    number = str(digests.index(entry.digest) + 1) if entry.digest in digests else "-"
    is_baseline = shown.baseline is not None and entry.digest == shown.baseline.digest
    return number + ("*" if entry.digest == shown.best else "") + ("L" if is_baseline else "")


def versus(shown: FrontView, entry: Entry, levels: Mapping[str, LevelVerdict]) -> str:
    """How a member compares with the tuned LoRA, such as wins +0.012."""
    if shown.baseline is not None and entry.digest == shown.baseline.digest:
        return "is LoRA"
    level = levels.get(entry.digest)
    return "" if level is None else f"{level.result} {level.gain:+.3f}"


def levels_by_digest(shown: FrontView) -> dict[str, LevelVerdict]:
    """The verdict's levels by front member."""
    return {level.digest: level for level in shown.verdict.levels}


def rows_of(shown: FrontView) -> list[Entry]:
    """What a table lists: the front, and the tuned LoRA and the reference where not on it."""
    rows = list(shown.front)
    for entry in (shown.baseline, shown.reference):
        if entry is not None and entry.digest not in {row.digest for row in rows}:
            rows.append(entry)
    return sorted(rows, key=lambda e: [e.objectives[o.name] for o in shown.costs[:1]])


def front_table(shown: FrontView) -> Table:
    """The front, cheapest first, with the tuned LoRA and the reference beside it.

    The adapters have a column where there is room for one (a single cost), else `adapter_table`.
    """
    levels = levels_by_digest(shown)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("digest", no_wrap=True)
    for cost in shown.costs:
        table.add_column(heading(cost.name), justify="right", no_wrap=True)
    table.add_column(shown.quality.name, no_wrap=True)
    table.add_column("rate", justify="right", no_wrap=True)
    if levels:
        table.add_column("vs LoRA", no_wrap=True)
    has_room = len(shown.costs) < 2
    if has_room:
        table.add_column("adapter", ratio=1, overflow="fold")
    for entry in rows_of(shown):
        table.add_row(
            marks(shown, entry),
            entry.digest[:8],
            *(with_margin(entry, cost) for cost in shown.costs),
            quality_text(shown, entry),
            f"{entry.candidate.train.learning_rate:.2g}",
            *([versus(shown, entry, levels)] if levels else []),
            *([entry.summary] if has_room else []),
            style="bold" if entry.digest == shown.best else "",
        )
    return table


def adapter_table(shown: FrontView) -> Table:
    """What sits where, under the marks of `front_table`."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("adapter", overflow="fold")
    for entry in rows_of(shown):
        style = "bold" if entry.digest == shown.best else ""
        table.add_row(marks(shown, entry), entry.summary, style=style)
    return table


def budget_table(budget: BudgetReport) -> Table:
    """Where the time went: wall clock by phase, then worker time by activity."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("time")
    table.add_column("spent", justify="right")
    table.add_column("share", justify="right")
    for title, parts in (("wall clock", budget.phases), ("workers", budget.worker_seconds)):
        total = budget.spent_seconds if title == "wall clock" else sum(parts.values())
        table.add_row(title, human_seconds(total), "", style="bold")
        for name, seconds in parts.items():
            share = f"{seconds / total:.0%}" if total > 0 else ""
            table.add_row(f"  {name}", human_seconds(seconds), share)
    return table


def _trials_line(shown: FrontView) -> str:
    counts = ", ".join(f"{n} {state}" for state, n in shown.trials.items())
    return (
        f"Budget {shown.budget.limit}: {shown.budget.n_trials} trials ({counts}), "
        f"{human_count(shown.budget.spent_flops)} training FLOPs."
    )


def summary(record: RunRecord | FrontView) -> RenderableType:
    """What is printed when a search ends: verdict, front, legend, budget, warnings."""
    shown = view(record) if isinstance(record, RunRecord) else record
    parts: list[RenderableType] = [Text(shown.verdict.text, style="bold"), Text("")]
    parts.append(front_table(shown))
    split = "test" if shown.is_confirmed else "validation"
    legend = f"{shown.quality.name} on the {split} split, ± half a 95 % interval;"
    parts.append(Text(f"{legend}\n* the pick, L the tuned LoRA, - not on the front", style="dim"))
    if len(shown.costs) > 1:
        parts.append(adapter_table(shown))
    hidden = len(shown.dominated_finalists) + len(shown.unconfirmed)
    if hidden:
        parts.append(Text(f"{hidden} more candidates in front.json did not make it.", style="dim"))
    parts += [Text(""), Text(_trials_line(shown)), budget_table(shown.budget)]
    if shown.fidelity is not None:
        parts.append(Text(f"Rungs: {shown.fidelity.text()}."))
    parts += [Text(f"Warning: {line}") for line in shown.warnings]
    return Group(*parts)


def price_table(prices: PriceList) -> RenderableType:
    """What the space holds, then a sample of it, cheapest first."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("params", "size", "FLOPs", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("adapter", ratio=1, overflow="fold")
    for row in prices.rows:
        table.add_row(
            human_count(row.price.trainable_params),
            human_value(row.price.adapter_bytes, "bytes"),
            human_count(row.price.train_flops),
            human_value(row.price.peak_memory_bytes, "bytes"),
            row.kind,
            plan_summary(row.candidate.plan),
        )
    return Group(*(Text(line) for line in prices.lines), table)


def methods_table() -> Table:
    """Every method and what it can do, one line each; README.md has the sizes in full."""
    from autopeft.methods.table import rows

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("method", "where", "sizes", "rate", "merge", "LoRA", "quant", "shared"):
        table.add_column(name, no_wrap=name != "where", min_width=6 if name == "where" else None)
    for name, where, sizes, rate, *flags in rows():
        first, *_, last = [*sizes.split(), sizes.split()[-1]]
        shown = first if first == last else f"{first}-{last}"
        table.add_row(name, where, shown, rate, *flags)
    legend = "LoRA: is exactly one; quant: over 4-bit or 8-bit weights; shared: between sites"
    table.caption = legend
    return table


def spaces_table() -> Table:
    """Every shipped space."""
    from autopeft.searcher.space.space import available_spaces

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("space", no_wrap=True)
    table.add_column("what it holds")
    for name, description in available_spaces().items():
        table.add_row(name, description)
    return table
