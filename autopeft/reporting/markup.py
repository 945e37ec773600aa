"""The front as a small table in HTML, for notebooks, and in Markdown, for notes."""

from __future__ import annotations

import html
from collections.abc import Iterator

from autopeft.reporting.columns import Column, badges, front_columns, rows_of, split_name
from autopeft.reporting.front_view import FrontEntry, FrontView
from autopeft.utils.formatting import markdown_text


def _cells(shown: FrontView) -> Iterator[tuple[FrontEntry, list[str]]]:
    """Yield each row of the front's table with its texts, badges behind the number."""
    columns = front_columns(shown)
    for entry in rows_of(shown):
        number, *texts = (_text(column, entry) for column in columns)
        yield entry, [" ".join([number, *badges(shown, entry)]), *texts]


def _text(column: Column, entry: FrontEntry) -> str:
    text = column.text(entry)
    return text[:8] if column.kind == "digest" else text


def front_html(shown: FrontView) -> str:
    """Return verdict and front as HTML without scripts or styles of its own."""
    headings = "".join(f"<th>{html.escape(c.heading)}</th>" for c in front_columns(shown))
    rows = []
    for entry, texts in _cells(shown):
        cells = "".join(f"<td>{html.escape(text)}</td>" for text in texts)
        weight = ' style="font-weight: bold"' if entry.digest == shown.best else ""
        rows.append(f"<tr{weight}>{cells}</tr>")
    return (
        f"<p><b>{html.escape(shown.verdict.text)}</b></p>"
        f"<table><thead><tr>{headings}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        f"<p>{html.escape(_legend(shown))}</p>"
    )


def front_markdown(shown: FrontView) -> str:
    """Return verdict and front in Markdown, for the note of a study."""
    headings = [markdown_text(column.heading) for column in front_columns(shown)]
    rows = [f"| {' | '.join(map(markdown_text, texts))} |" for _, texts in _cells(shown)]
    if rows:
        rows = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|", *rows, ""]
    return "\n".join(
        [f"**{markdown_text(shown.verdict.text)}**", "", *rows, markdown_text(_legend(shown))]
    )


def _legend(shown: FrontView) -> str:
    counts = ", ".join(f"{n} {state}" for state, n in shown.trials.items())
    split = split_name(shown, shown.is_confirmed)
    return f"{shown.quality.name} on the {split} split, ± half a 95 % interval; {counts} trials"
