"""Callbacks: whoever is told of a search's progress, and what the terminal shows of it."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from autopeft.plan_text import plan_summary
from autopeft.trial import front_of
from autopeft.utils.formatting import human_count, human_seconds, human_value

if TYPE_CHECKING:
    from autopeft.engine.dispatcher import Snapshot


class Observer(Protocol):
    """Whoever shows a search's progress."""

    def note(self, text: str) -> None:
        """A line worth reading."""

    def snapshot(self, snapshot: Snapshot) -> None:
        """The state after every change."""


class Silent:
    """Shows nothing."""

    def note(self, text: str) -> None:
        """Ignored."""

    def snapshot(self, snapshot: Snapshot) -> None:
        """Ignored."""


@contextmanager
def shown_progress() -> Iterator[Observer]:
    """A live display on a terminal, plain lines elsewhere."""
    if not sys.stdout.isatty():
        yield PlainProgress()
        return
    console = Console()
    progress = LiveProgress(console)
    with Live(console=console, get_renderable=progress.render, refresh_per_second=2):
        yield progress


def counts_line(snapshot: Snapshot) -> str:
    """Phase, trials by state and what is left, on one line."""
    counts = Counter(outcome.state for outcome in snapshot.outcomes)
    parts = [
        f"{counts['complete']} complete",
        f"{counts['pruned']} pruned",
        f"{counts['failed']} failed",
        f"{snapshot.n_running} running",
    ]
    if snapshot.n_to_confirm:
        parts.append(f"confirmed {snapshot.n_confirmed}/{snapshot.n_to_confirm}")
    if snapshot.seconds_left != float("inf"):
        parts.append(f"{human_seconds(snapshot.seconds_left)} left")
    return f"{snapshot.phase}: " + ", ".join(parts)


class PlainProgress:
    """One line for each finished trial, for logs and pipes."""

    def __init__(self) -> None:
        self._told: set[int] = set()
        self._last_line = ""
        self._last_at = 0.0

    def note(self, text: str) -> None:
        """Prints the line."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def snapshot(self, snapshot: Snapshot) -> None:
        """Prints what ended since the last call; during confirmation, a line now and then."""
        for outcome in snapshot.outcomes:
            if outcome.number in self._told:
                continue
            self._told.add(outcome.number)
            quality = snapshot.objectives[0].name
            value = outcome.objectives.get(quality)
            score = "" if value is None else f" {quality} {value:.4f}"
            why = f" ({outcome.reason})" if outcome.state == "failed" else ""
            self.note(
                f"trial {outcome.number:>3} {outcome.state}{score}, "
                f"{human_count(outcome.price.trainable_params)} params, "
                f"rate {outcome.candidate.train.learning_rate:.2g}, "
                f"{plan_summary(outcome.candidate.plan)}{why}"
            )
        if snapshot.phase != "search":
            line = counts_line(snapshot)
            if line != self._last_line and time.monotonic() - self._last_at > 5:
                self._last_line, self._last_at = line, time.monotonic()
                self.note(line)


class LiveProgress:
    """A table that keeps itself up to date."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._snapshot: Snapshot | None = None
        self._began = time.monotonic()

    def note(self, text: str) -> None:
        """Prints the line above the table."""
        self._console.print(Text(text))

    def snapshot(self, snapshot: Snapshot) -> None:
        """Keeps the state for the next refresh."""
        self._snapshot = snapshot

    def render(self) -> RenderableType:
        """The table now."""
        spent = human_seconds(time.monotonic() - self._began)
        if self._snapshot is None:
            return Text(f"{spent}  starting up: reading data, pricing, loading the model ...")
        table = front_so_far(self._snapshot)
        return Group(Text(f"{spent}  {counts_line(self._snapshot)}", style="bold"), table)


def front_so_far(snapshot: Snapshot) -> Table:
    """The current front, on validation numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for objective in snapshot.objectives[1:]:
        table.add_column(objective.name, justify="right", no_wrap=True)
    table.add_column(f"{snapshot.objectives[0].name} (validation)", no_wrap=True)
    table.add_column("rate", justify="right", no_wrap=True)
    table.add_column("adapter", ratio=1, overflow="fold")
    for outcome in front_of(snapshot.outcomes, snapshot.objectives):
        values = [
            human_value(outcome.objectives[o.name], o.unit)
            for o in [*snapshot.objectives[1:], snapshot.objectives[0]]
        ]
        rate = f"{outcome.candidate.train.learning_rate:.2g}"
        table.add_row(*values, rate, plan_summary(outcome.candidate.plan))
    return table
