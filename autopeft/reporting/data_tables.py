"""Tables about tasks and data for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autopeft.reporting.tables import plain_table
from autopeft.tasks.registry import TASKS

if TYPE_CHECKING:
    from autopeft.tasks.preview import Preview, PreviewRow


def tasks_table() -> Table:
    """Return every task with its columns and metrics; the default metric comes first."""
    table = plain_table()
    table.add_column("task", no_wrap=True)
    table.add_column("learns", ratio=2)
    table.add_column("columns", ratio=3)
    table.add_column("metrics", ratio=2)
    for task in TASKS.parts():
        columns = (c.role if c.is_required else f"[{c.role}]" for c in task.columns)
        metrics = ", ".join(task.metrics)
        # Brackets would be read as markup.
        table.add_row(task.name, task.description, Text(", ".join(columns)), metrics)
    table.caption = Text("[columns] in brackets may be missing; the first metric is the default")
    return table


def preview_text(preview: Preview) -> RenderableType:
    """Return rows as the model sees them; what is learned is bold and between arrows."""
    low, middle, high, longest = preview.lengths
    parts: list[RenderableType] = [Text(f"task {preview.task}", style="bold")]
    parts += [Text(f"  {line}") for line in preview.lines]
    if longest > 1:
        parts.append(
            Text(f"  tokens a row: {low} to {longest}, median {middle}, 90 % up to {high}")
        )
    for row in preview.rows:
        parts += [Text(""), _row(row)]
    parts += [Text(""), Text("»learned«, everything else is given", style="dim")]
    return Group(*parts)


def _row(row: PreviewRow) -> Text:
    text = Text(f"row {row.source_row}", style="dim")
    for pieces in row.sequences:
        text.append(f"\n  {sum(piece.n_tokens for piece in pieces)} tokens: ")
        for piece in pieces:
            shown = f"»{piece.text}«" if piece.is_learned else piece.text
            text.append(shown, style="bold not dim" if piece.is_learned else "not dim")
    if row.target:
        text.append("\n  label: ").append(f"»{row.target}«", style="bold not dim")
    return text
