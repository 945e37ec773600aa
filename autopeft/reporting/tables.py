"""Tables for the terminal: verdict, front, budget; legible at 80 columns and without color."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from autopeft.costs.objectives import COSTS
from autopeft.costs.price import PriceList
from autopeft.plan_text import plan_summary
from autopeft.reporting.columns import (
    VERSUS,
    Column,
    badges,
    converted_lines,
    front_columns,
    heading,
    rows_of,
    split_name,
)
from autopeft.reporting.front_view import FrontEntry, FrontView
from autopeft.reporting.record import BudgetReport
from autopeft.utils.formatting import counted, human_count, human_seconds, human_value

_MARKS = {"the pick": "*", "tuned LoRA": "L"}

_ADAPTER_WIDTH = 16
"""Cells that a column of adapters needs at least."""


def plain_table() -> Table:
    """Return an empty table in the style of all of them."""
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _mark(shown: FrontView, entry: FrontEntry, number: str) -> str:
    return number + "".join(_MARKS[name] for name in badges(shown, entry))


def front_tables(shown: FrontView, width: int) -> tuple[list[Table], Table | None]:
    """Return the front, cheapest first, with the tuned LoRA and the reference beside it.

    Every objective is shown in full. Where one table lacks the room, the last columns that are no
    objectives move to the second part, and objectives continue in further tables under the same
    marks. The adapter is in the first part only with a single cost, and if there is room.

    Args:
        shown: The search.
        width: Of the terminal, in cells.

    Returns:
        The tables of the objectives, and the one of adapters; None if they are in the former.
    """
    number, *columns, adapter = front_columns(shown)
    if len(shown.costs) == 1 and _width(shown, [number, *columns]) + _ADAPTER_WIDTH <= width:
        return [_table(shown, [number, *columns, adapter])], None
    moved: list[Column] = []
    for column in [column for column in reversed(columns) if not column.is_objective]:
        if _width(shown, [number, *columns]) <= width:
            break
        columns.remove(column)
        moved.insert(0, column)
    parts = [[number]]
    for column in columns:
        if len(parts[-1]) > 1 and _width(shown, [*parts[-1], column]) > width:
            parts.append([number])
        parts[-1].append(column)
    return [_table(shown, part) for part in parts], _table(shown, [number, *moved, adapter])


def _table(shown: FrontView, columns: Sequence[Column]) -> Table:
    """Return a table of some columns, the number first."""
    table = plain_table()
    for column in columns:
        if column.kind == "adapter":
            # It takes the room that the others leave.
            ratio = 1 if any(each.is_objective for each in columns) else None
            table.add_column(column.heading, ratio=ratio, overflow="fold")
        else:
            table.add_column(
                column.heading.strip("#"),
                justify="right" if column.kind == "number" else "left",
                no_wrap=True,
            )
    for entry in rows_of(shown):
        number, *cells = (
            column.text(entry)[:8] if column.kind == "digest" else column.text(entry)
            for column in columns
        )
        style = "bold" if entry.digest == shown.best else ""
        table.add_row(_mark(shown, entry, number), *cells, style=style)
    return table


def _width(shown: FrontView, columns: Sequence[Column]) -> int:
    """Return the cells that a table takes if nothing is cut."""
    return Console(width=10_000).measure(_table(shown, columns)).maximum


def budget_table(budget: BudgetReport) -> Table:
    """Return wall-clock time by phase, then worker time by activity."""
    table = plain_table()
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


@dataclass(frozen=True)
class _Summary:
    """The summary of a search, laid out for the terminal that shows it."""

    shown: FrontView

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _summary(self.shown, options.max_width)


def summary(shown: FrontView) -> RenderableType:
    """Return what is printed when a search ends: verdict, front, legend, budget, warnings."""
    return _Summary(shown)


def _summary(shown: FrontView, width: int) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(shown.verdict.text, style="bold"), Text("")]
    tables, adapters = front_tables(shown, width)
    parts += tables
    split = split_name(shown, shown.is_confirmed)
    legend = f"{shown.quality.name} on the {split} split, ± half a 95 % interval;"
    parts.append(Text(f"{legend}\n* the pick, L the tuned LoRA, - not on the front", style="dim"))
    if shown.verdict.levels:
        parts.append(Text(VERSUS, style="dim"))
    if adapters is not None:
        parts.append(adapters)
    hidden = len(shown.dominated_finalists) + len(shown.unconfirmed)
    if hidden:
        text = f"Not on the front, but in front.json: {hidden} more."
        parts.append(Text(text, style="dim"))
    counts = ", ".join(f"{n} {state}" for state, n in shown.trials.items())
    trials = f"Budget {shown.budget.limit}: {counted(shown.budget.n_trials, 'trial')} ({counts}), "
    trials += f"{human_count(shown.budget.spent_flops)} training FLOPs."
    parts += [Text(""), Text(trials), budget_table(shown.budget)]
    if shown.fidelity is not None:
        parts.append(Text(f"Rungs: {shown.fidelity.text()}."))
    parts += [Text(f"As exported: {line}") for line in converted_lines(shown)]
    parts += [Text(f"Warning: {line}") for line in shown.warnings]
    return parts


def price_table(prices: PriceList) -> RenderableType:
    """Return the space in words, then a sample of its candidates, cheapest first."""
    table = plain_table()
    costs = ("trainable_params", "adapter_bytes", "train_flops", "peak_memory_bytes")
    for name in costs:
        table.add_column(heading(name), justify="right", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("adapter", ratio=1, overflow="fold")
    for row in prices.rows:
        values = (human_value(row.price.value(name), COSTS[name].unit) for name in costs)
        table.add_row(*values, row.kind, plan_summary(row.candidate.plan))
    return Group(*(Text(line) for line in prices.lines), table)


def fits_table(prices: PriceList) -> RenderableType:
    """Return what fits in a memory, one line for each way to save it."""
    table = plain_table()
    table.add_column("quantization", no_wrap=True)
    table.add_column("checkpointing", no_wrap=True)
    for name in ("needs", "rank", "batch_size", "max_length"):
        table.add_column(name, justify="right", no_wrap=True)
    for fit in prices.fits:
        largest = (str(n) if n else "-" for n in (fit.rank, fit.batch_size, fit.length))
        checkpointing = "yes" if fit.gradient_checkpointing else "no"
        table.add_row(fit.quantization, checkpointing, human_value(fit.needed, "bytes"), *largest)
    legend = "needs: with the settings as they are; the others: the largest that fits, -: none"
    return Group(*(Text(line) for line in prices.lines), table, Text(legend, style="dim"))


def methods_table() -> Table:
    """Return every method and its properties, one line each; the guide lists all sizes."""
    from autopeft.methods.table import rows

    table = plain_table()
    for name in ("method", "where", "sizes", "rate", "merge", "LoRA", "quant", "shared"):
        table.add_column(name, no_wrap=name != "where", min_width=6 if name == "where" else None)
    for name, where, sizes, rate, *flags in rows():
        first, *_, last = [*sizes.split(), sizes.split()[-1]]
        table.add_row(name, where, first if first == last else f"{first}-{last}", rate, *flags)
    table.caption = (
        "LoRA: is exactly one; quant: over 4-bit or 8-bit weights; shared: between sites"
    )
    return table


def spaces_table() -> Table:
    """Return every shipped space with its description."""
    from autopeft.searcher.space.space import available_spaces

    table = plain_table()
    table.add_column("space", no_wrap=True)
    table.add_column("description")
    for name, description in available_spaces().items():
        table.add_row(name, description)
    return table
