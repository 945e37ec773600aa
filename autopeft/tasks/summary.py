"""What was read: rows, columns, and all that was dropped, cut or noticed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_SHOWN_LABELS = 10


@dataclass(frozen=True)
class DataSummary:
    """What a search was given, told at its start and kept in its report.

    Attributes:
        rows: Split name -> usable rows.
        dropped_rows: Rows dropped for any reason but being a duplicate.
        labels: Class names in index order; empty if the task has none.
        fingerprint: Digest of the rows; equal for two searches on the same data.
        task: Name of the task.
        columns: Role -> column of the source.
        sources: Split name -> file, or hub id and split.
        dropped: Reason -> number of rows dropped for it.
        n_duplicates: Rows dropped because a later split has them too.
        n_cut: Rows cut to `max_length`.
        max_length: Longest sequence allowed, in tokens; 0 without tokens.
        available: Split name -> rows that there were, where a setting took fewer.
        notes: What else was noticed, one sentence each.
        usage: Python that uses the trained model, for its card; see `Task.usage`.
    """

    rows: Mapping[str, int] = field(default_factory=dict)
    dropped_rows: int = 0
    labels: tuple[str, ...] = ()
    fingerprint: str = ""
    task: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    n_duplicates: int = 0
    n_cut: int = 0
    max_length: int = 0
    available: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    usage: str = ""

    def headline(self) -> str:
        """Return the task and its columns, on one line."""
        columns = ", ".join(f"{role}={name}" for role, name in self.columns.items())
        return _one_line(f"task {self.task}" + (f" ({columns})" if columns else ""))

    def lines(self) -> list[str]:
        """Return what a user should know about the data, one line each; rows first."""
        sizes = ", ".join(f"{n} {name}" for name, n in self.rows.items())
        lines = [f"{sizes or 'unknown'} rows"]
        if self.labels:
            shown = ", ".join(self.labels[:_SHOWN_LABELS])
            more = len(self.labels) - _SHOWN_LABELS
            lines.append(f"{len(self.labels)} labels: {shown}" + (", ..." if more > 0 else ""))
        lines += [f"{_rows(count)} dropped: {reason}" for reason, count in self.dropped.items()]
        if self.dropped_rows and not self.dropped:  # read from an earlier version's file
            lines.append(f"{_rows(self.dropped_rows)} dropped")
        if self.n_duplicates:
            lines.append(f"{_rows(self.n_duplicates)} dropped: a later split has them too")
        if self.n_cut:
            total = sum(self.rows.values())
            lines.append(f"{self.n_cut} of {_rows(total)} cut to {self.max_length} tokens")
        lines += [
            f"{self.rows[name]} of {_rows(count)} for {name} used, as max_{name}_rows says"
            for name, count in self.available.items()
            if name in self.rows
        ]
        return [_one_line(line) for line in (*lines, *self.notes)]


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


def _one_line(text: str) -> str:
    """Return a text on one line: labels and columns may hold line breaks."""
    return " ".join(text.split())
