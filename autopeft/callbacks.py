"""Callbacks that show the progress of a search in a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from autopeft.engine.callback import Callback
from autopeft.plan_text import plan_summary
from autopeft.utils.formatting import human_count, human_seconds, human_value

if TYPE_CHECKING:
    from autopeft.costs.objectives import Objective
    from autopeft.engine.callback import Progress
    from autopeft.trial import Trial


@contextmanager
def shown_progress() -> Iterator[Callback]:
    """A live display on a terminal, plain lines elsewhere."""
    if not sys.stdout.isatty():
        yield PlainProgress()
        return
    console = Console()
    progress = LiveProgress(console)
    with Live(console=console, get_renderable=progress.render, refresh_per_second=2):
        yield progress


def counts_line(progress: Progress) -> str:
    """Return the phase, the trials by state and what is left, on one line."""
    parts = [f"{count} {state}" for state, count in progress.n_trials.items()]
    parts.append(f"{progress.n_running} running")
    if progress.n_to_confirm:
        parts.append(f"confirmed {progress.n_confirmed}/{progress.n_to_confirm}")
    if progress.seconds_left != float("inf"):
        parts.append(f"{human_seconds(progress.seconds_left)} left")
    return f"{progress.phase}: " + ", ".join(parts)


def trial_line(trial: Trial, quality: Objective) -> str:
    """Return how a trial ended, on one line."""
    value = trial.values.get(quality.name)
    score = "" if value is None else f" {quality.name} {value:.4f}"
    why = f" ({trial.reason})" if trial.state == "failed" else ""
    return (
        f"trial {trial.number:>3} {trial.state}{score}, "
        f"{human_count(trial.costs.trainable_params)} params, "
        f"rate {trial.train.learning_rate:.2g}, {plan_summary(trial.plan)}{why}"
    )


class PlainProgress(Callback):
    """Prints a line for each ended trial, for logs and pipes."""

    def __init__(self) -> None:
        self._last_number = -1
        self._last_line = ""
        self._last_at = 0.0

    def on_message(self, text: str) -> None:
        """Print the line."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def on_progress(self, progress: Progress) -> None:
        """Print the trial that has ended; during confirmation, a line every five seconds."""
        ended = progress.ended
        if ended is not None and ended.number != self._last_number:
            self._last_number = ended.number
            self.on_message(trial_line(ended, progress.objectives[0]))
        if progress.phase != "search":
            line = counts_line(progress)
            if line != self._last_line and time.monotonic() - self._last_at > 5:
                self._last_line, self._last_at = line, time.monotonic()
                self.on_message(line)


class LiveProgress(Callback):
    """A table in the terminal that is kept up to date."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._began = time.monotonic()

    def on_message(self, text: str) -> None:
        """Print the line above the table."""
        self._console.print(Text(text))

    def on_progress(self, progress: Progress) -> None:
        """Keep the state for the next refresh."""
        self._progress = progress

    def render(self) -> RenderableType:
        """Return the table as it stands."""
        spent = human_seconds(time.monotonic() - self._began)
        if self._progress is None:
            return Text(f"{spent}  starting up: reading data, pricing, loading the model ...")
        table = front_so_far(self._progress)
        return Group(Text(f"{spent}  {counts_line(self._progress)}", style="bold"), table)


def front_so_far(progress: Progress) -> Table:
    """Return the current front, on validation numbers, as a table."""
    quality, *costs = progress.objectives
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for cost in costs:
        table.add_column(cost.name, justify="right", no_wrap=True)
    table.add_column(f"{quality.name} (validation)", no_wrap=True)
    table.add_column("rate", justify="right", no_wrap=True)
    table.add_column("adapter", ratio=1, overflow="fold")
    for trial in progress.front:
        values = [human_value(trial.values[o.name], o.unit) for o in (*costs, quality)]
        rate = f"{trial.train.learning_rate:.2g}"
        table.add_row(*values, rate, plan_summary(trial.plan))
    return table
