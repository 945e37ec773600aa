"""How much time the search itself takes per message, from a hundred to ten thousand trials.

    python examples/benchmarks/messages.py

Trials report at three rungs and end; a formula stands in for training. The CPU time per ask, report
and tell should not grow with the number of trials.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field

import numpy as np
from responses import Response, make_space
from rich.console import Console
from rich.table import Table

from autopeft import Decision, SearchController
from autopeft.searcher.space.space import SearchSpace

_RUNGS = (11, 33, 100)
_MARKS = (100, 300, 1000, 3000, 10_000)
_QUICK_MARKS = (10, 30)


@dataclass
class Times:
    """Seconds and number of the messages of each kind."""

    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, seconds: float) -> None:
        """Count one message."""
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def mean_ms(self, kind: str) -> float:
        """Return the mean time of a message in milliseconds; NaN if there was none."""
        count = self.counts.get(kind, 0)
        return 1e3 * self.seconds[kind] / count if count else float("nan")


def main() -> None:
    """Search and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sampler", default="random", help="autopeft takes 0.1 s per ask")
    parser.add_argument("--trials", type=int, default=max(_MARKS))
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args()
    marks = _QUICK_MARKS if options.quick else [m for m in _MARKS if m <= options.trials]
    rows = measure(options.sampler, marks)
    table = Table("trials", "ms per ask", "ms per report", "ms per tell", "ms per trial")
    for mark, times in zip(marks, rows, strict=True):
        means = [times.mean_ms(kind) for kind in ("ask", "report", "tell")]
        total = 1e3 * sum(times.seconds.values()) / times.counts["ask"]
        table.add_row(f"{mark:,}", *(f"{mean:.2f}" for mean in (*means, total)))
    Console().print(table)


def measure(sampler: str, marks: list[int] | tuple[int, ...]) -> list[Times]:
    """Search up to the last mark; return the times of the trials before each mark since the last.

    Args:
        sampler: Its name.
        marks: Numbers of trials, ascending.
    """
    space: SearchSpace = make_space()
    response = Response.draw("noisy", 0, space)
    controller = SearchController(space, ["accuracy", "trainable_params"], sampler=sampler, seed=0)
    rng = np.random.default_rng(0)
    found: list[Times] = []
    times = Times()
    for number in range(1, max(marks) + 1):
        _run_trial(controller, response, rng, times)
        if number in marks:
            found.append(times)
            times = Times()
    return found


def _run_trial(
    controller: SearchController, response: Response, rng: np.random.Generator, times: Times
) -> None:
    began = time.process_time()
    trial = controller.ask()
    times.add("ask", time.process_time() - began)
    assert trial is not None
    score = response(trial.candidate)
    for step in _RUNGS:
        began = time.process_time()
        decision = controller.report(trial, step, score - 1.0 / step + 0.01 * rng.normal())
        times.add("report", time.process_time() - began)
        if decision is Decision.STOP:
            return
    began = time.process_time()
    controller.tell(trial, score=score)
    times.add("tell", time.process_time() - began)


if __name__ == "__main__":
    main()
