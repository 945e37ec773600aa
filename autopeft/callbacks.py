"""Callbacks that show the progress of a search in a terminal."""

from __future__ import annotations

import html
import io
import math
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from autopeft.engine.callback import Callback
from autopeft.errors import printable
from autopeft.plan_text import plan_summary
from autopeft.trial import TIME_UP
from autopeft.utils.formatting import human_count, human_seconds, human_value
from autopeft.utils.terminal import console

if TYPE_CHECKING:
    from autopeft.costs.objectives import Objective
    from autopeft.engine.callback import Progress
    from autopeft.engine.messages import StepMessage
    from autopeft.trial import Trial


@contextmanager
def shown_progress(file: TextIO | None = None) -> Iterator[Callback]:
    """A live display on a terminal or in a notebook, plain lines elsewhere.

    Args:
        file: Where it is written; None: standard output.
    """
    file = sys.stdout if file is None else file
    if _is_notebook():
        with warnings.catch_warnings():
            # On import in a notebook, tqdm asks for widgets; it draws no bar here.
            warnings.filterwarnings("ignore", "IProgress not found")
            import_module("tqdm.auto")
        yield NotebookProgress()
        return
    if file is None or not file.isatty():
        yield PlainProgress(file)
        return
    display = console(file)
    progress = LiveProgress(display)
    with Live(console=display, get_renderable=progress.render, refresh_per_second=2):
        yield progress


def _is_notebook() -> bool:
    """Return whether this runs in a kernel of Jupyter, which shows HTML."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"


def counts_line(progress: Progress) -> str:
    """Return the phase, the trials by state and what is left, on one line."""
    parts = [f"{count} {state}" for state, count in progress.n_trials.items()]
    parts.append(f"{progress.n_running} running")
    if progress.n_to_confirm:
        parts.append(f"confirmed {progress.n_confirmed}/{progress.n_to_confirm}")
    if progress.seconds_left != float("inf"):
        parts.append(f"{human_seconds(progress.seconds_left)} left")
    return f"{progress.phase}: " + ", ".join(parts)


def steps_text(step: StepMessage) -> str:
    """Return how far a running job is: "trial 7: step 31/75, loss 0.52, 2.1 steps/s"."""
    _, digest, seed = step.job
    name = f"trial {step.number}" if step.number >= 0 else f"confirming {digest[:8]}, seed {seed}"
    parts = [f"step {step.step}/{step.steps}"]
    if math.isfinite(step.loss):
        parts.append(f"loss {step.loss:.3g}")
    rate = step.steps_per_second
    parts.append("scoring" if rate is None else f"{rate:.2g} steps/s")
    return f"{name}: {', '.join(parts)}"


def trial_line(trial: Trial, quality: Objective) -> str:
    """Return how a trial ended, on one line."""
    value = trial.values.get(quality.name)
    score = (
        "" if value is None else f" {quality.name} {value:{'.4f' if abs(value) < 1e6 else '.4g'}}"
    )
    why = f" ({trial.reason})" if trial.state == "failed" or trial.reason == TIME_UP else ""
    rate = f"rate {trial.train.learning_rate:.2g}, " if trial.costs.trainable_params else ""
    return (
        f"trial {trial.number:>3} {trial.state}{score}, "
        f"{human_count(trial.costs.trainable_params)} params, "
        f"{rate}{plan_summary(trial.plan)}{why}"
    )


_BUSY, _QUIET = 5.0, 15.0
"""Least seconds between two lines of counts: something was confirmed, or nothing is new."""


class PlainProgress(Callback):
    """Prints a line for each ended trial, for logs and pipes."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file
        self._last_number = -1
        self._last_confirmed = 0
        self._last_at = time.monotonic()

    def on_message(self, text: str) -> None:
        """Print the line."""
        self._last_at = time.monotonic()
        file = self._file or sys.stdout
        if file is None:  # Closed for this process, as by `>&-`.
            return
        file.write(printable(text) + "\n")
        file.flush()

    def on_progress(self, progress: Progress) -> None:
        """Print the trial that has ended; a line of its own after 15 seconds without one.

        During confirmation, a line for what was confirmed, at most every five seconds.
        """
        ended = progress.ended
        if ended is not None and ended.number != self._last_number:
            self._last_number = ended.number
            self.on_message(trial_line(ended, progress.objectives[0]))
        is_new = progress.n_confirmed != self._last_confirmed
        if time.monotonic() - self._last_at > (_BUSY if is_new else _QUIET):
            self._last_confirmed = progress.n_confirmed
            self.on_message("; ".join([counts_line(progress), *map(steps_text, progress.steps)]))


class LiveProgress(Callback):
    """A table in the terminal that is kept up to date."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._began = self._heard_at = time.monotonic()

    def on_message(self, text: str) -> None:
        """Print the line above the table."""
        self._console.print(Text(text))

    def on_progress(self, progress: Progress) -> None:
        """Keep the state for the next refresh."""
        self._progress, self._heard_at = progress, time.monotonic()

    def render(self) -> RenderableType:
        """Return the table as it stands."""
        now = time.monotonic()
        spent, progress = human_seconds(now - self._began), self._progress
        if progress is None:
            return Text(f"{spent}  starting up: reading data, pricing, loading the model ...")
        # The clock goes on while nothing is heard.
        left = max(0.0, progress.seconds_left - (now - self._heard_at))
        progress = replace(progress, seconds_left=left)
        head = Text(f"{spent}  {counts_line(progress)}", style="bold")
        return Group(head, *map(Text, map(steps_text, progress.steps)), front_so_far(progress))


class NotebookProgress(Callback):
    """One output of a notebook's cell that is kept up to date."""

    def __init__(self) -> None:
        self._display: Any = None
        self._lines: list[str] = []
        self._last_at = 0.0
        self._progress: Progress | None = None

    def on_message(self, text: str) -> None:
        """Keep the line above the table."""
        self._lines.append(text)
        self._show()

    def on_progress(self, progress: Progress) -> None:
        """Show the state, at most twice a second."""
        self._progress = progress
        if time.monotonic() - self._last_at > 0.5 or progress.phase == "done":
            self._show()

    def _show(self) -> None:
        from IPython.display import HTML, display

        self._last_at = time.monotonic()
        lines = "\n".join(map(html.escape, map(printable, self._lines)))
        shown = HTML(f"<pre>{lines}</pre>{self._table()}")
        if self._display is None:
            self._display = display(shown, display_id=True)
        else:
            self._display.update(shown)

    def _table(self) -> str:
        """Return the front so far as HTML: rich's own needs widgets in a notebook."""
        if self._progress is None:
            return ""
        page = console(io.StringIO(), record=True, width=100, force_jupyter=False)
        counts = Text(counts_line(self._progress), style="bold")
        lines = map(Text, map(steps_text, self._progress.steps))
        page.print(counts, *lines, front_so_far(self._progress), sep="\n")
        return page.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


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
