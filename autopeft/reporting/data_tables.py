"""Tables about tasks and data for the terminal; legible at 80 columns and without color."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autopeft.tasks.registry import TASKS
from autopeft.utils.formatting import middle_cut

if TYPE_CHECKING:
    from autopeft.tasks.base import Task
    from autopeft.tasks.preview import Piece, Preview, PreviewRow

_GIVEN = 240
"""Longest given text, in characters, that a preview shows whole."""


def tasks_table() -> RenderableType:
    """Return every task with its columns, metrics and options."""
    parts: list[RenderableType] = []
    for task in TASKS.parts():
        parts += [Text(task.name, style="bold"), _facts(_task_facts(task)), Text("")]
    hint = "[columns] in brackets may be missing; the first metric is the default; an option is set"
    return Group(*parts, Text(f"{hint} with --task-options name=value", style="dim"))


def _task_facts(task: Task) -> Iterable[tuple[str, str]]:
    yield "learns", task.description
    yield "columns", ", ".join(c.role if c.is_required else f"[{c.role}]" for c in task.columns)
    yield "metrics", task.metric_names()
    yield "space", task.space if isinstance(task.space, str) else "its own"
    options = (f"{k}={v}" if v != "" else k for k, v in task.options.items())
    if task.options:
        yield "options", ", ".join(options)


def _facts(rows: Iterable[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for name, text in rows:
        # Brackets would be read as markup.
        grid.add_row(f"  {name}", Text(text))
    return grid


def preview_text(preview: Preview) -> RenderableType:
    """Return rows as the model sees them; what is learned is bold and between » and «.

    Long given text loses its middle, and what is learned is shown whole.
    """
    low, middle, high, longest = preview.lengths
    parts: list[RenderableType] = [Text(preview.data.headline(), style="bold")]
    parts += [Text(f"- {line}") for line in preview.data.lines()]
    if longest > 1:
        parts.append(
            Text(f"- tokens a row: {low} to {longest}, median {middle}, 90 % up to {high}")
        )
    for row in preview.rows:
        title = f"row {row.source_row + 1} of {row.source}"
        parts += [Text(""), Text(title, style="dim"), _row(row)]
    parts += [Text(""), Text("»learned«, everything else is given", style="dim")]
    return Group(*parts)


def _row(row: PreviewRow) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for sequence in row.sequences:
        n_tokens = sum(piece.n_tokens for piece in sequence.pieces)
        name = f"  {sequence.name} ".rstrip() if sequence.name else " "
        text = Text(f"{n_tokens} token{'' if n_tokens == 1 else 's'}: ", style="dim")
        grid.add_row(name, text.append(_pieces(sequence.pieces)))
    for name, shown in row.inputs:
        grid.add_row(f"  {name}", shown)
    if row.target:
        grid.add_row("  label", Text(f"»{row.target}«", style="bold"))
    return grid


def _pieces(pieces: Iterable[Piece]) -> Text:
    text = Text()
    for piece in pieces:
        if piece.is_learned:
            target = f"/{piece.target}" if piece.target else ""
            text.append(f"»{piece.text}{target}«", style="bold not dim")
        else:
            text.append(middle_cut(piece.text, _GIVEN), style="not dim")
    return text
