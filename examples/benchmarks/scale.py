"""Can one driver serve a thousand workers? The dispatcher's own time, memory and the workers' wait.

    python examples/benchmarks/scale.py

Simulated workers take jobs from the real dispatcher, with the real searcher, study and store, and
report at rungs; a formula stands in for training. Only the workers' time is simulated: each
training takes `--seconds`, give or take a third, and the driver's time for each call is measured
and counts as time that those workers wait who come in the meantime.

Told are reports a second of driver time, the time of an ask, how much of their time workers wait,
and the driver's memory; of each kind of call also what the last tenth took, because nothing may
grow with the study. Where Linux tells it, the time in which other processes had the processor does
not count: a driver has a core of its own. At the end, or at a SIGTERM, every decision is compared
with the study: none may be lost.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from responses import Response, make_space
from rich.console import Console
from rich.table import Table

from autopeft import Dispatcher, SearchController, SearchSettings
from autopeft.confirm.store import ConfirmationStore
from autopeft.engine.budget import Budget, BudgetTracker
from autopeft.engine.messages import Activity, Job, RungMessage
from autopeft.searcher.study import read_study
from autopeft.trial import RungReport

_RUNGS = (11, 33, 100)

_TELL_EVERY = 10_000
"""Reports between two lines that tell how far a run is."""


@dataclass
class Seen:
    """What was counted, and the driver's seconds by kind of call."""

    asks: list[float] = field(default_factory=list)
    reports: list[float] = field(default_factory=list)
    waited: float = 0.0
    waited_at_start: float = 0.0
    trained: float = 0.0
    decisions: Counter[str] = field(default_factory=Counter)


def main() -> None:
    """Simulate, print the table, and check that nothing was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--reports", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=600.0, help="of one whole training")
    parser.add_argument("--sampler", default="autopeft")
    parser.add_argument("--storage", help="Optuna storage; by default a journal file")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.workers, options.reports, options.sampler = 20, 200, "random"
    with tempfile.TemporaryDirectory() as folder:
        storage = options.storage or f"{folder}/study.log"
        seen = simulate(
            storage, Path(folder), options.workers, options.reports, options.seconds,
            options.sampler,
        )  # fmt: skip
        # Before the study is read a second time.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        states = Counter(trial.state for trial in read_study(storage, "scale")[0])
    lost = {state: n - states[state] for state, n in seen.decisions.items() if n != states[state]}
    n_reports, driver = len(seen.reports), sum(seen.reports) + sum(seen.asks)
    table = Table("figure", "value")
    table.add_row("workers", f"{options.workers:,}")
    table.add_row("reports, trials", f"{n_reports:,}, {len(seen.asks):,}")
    table.add_row("reports a second of driver time", f"{n_reports / driver:,.0f}")
    table.add_row("ms a report: mean, last tenth, largest", _ms(seen.reports))
    table.add_row("ms an ask: mean, last tenth, largest", _ms(seen.asks))
    offered = seen.waited + seen.trained
    table.add_row("workers wait", f"{seen.waited / offered:.2%}")
    table.add_row("the same, but for their first job", _later(seen))
    table.add_row("seconds until all train", f"{sum(seen.asks[: options.workers]):.1f}")
    table.add_row("driver's peak memory", f"{peak:.2f} GiB")
    table.add_row("decisions that the study lacks", str(sum(lost.values())))
    Console().print(table)
    if lost:
        raise SystemExit(f"lost: {lost}")


def _seconds() -> float:
    """Return a time that stands still while the process is ready but others have the processor."""
    try:
        with open("/proc/thread-self/schedstat", encoding="ascii") as file:
            ready = int(file.read().split()[1]) / 1e9
    except OSError:
        ready = 0.0
    return time.perf_counter() - ready


def _ms(seconds: list[float]) -> str:
    last = seconds[-max(1, len(seconds) // 10) :]
    means = [f"{1e3 * statistics.fmean(part):.2f}" for part in (seconds, last)]
    return f"{', '.join(means)}, {1e3 * max(seconds):.0f}"


def _later(seen: Seen) -> str:
    waited = seen.waited - seen.waited_at_start
    return f"{waited / (waited + seen.trained):.2%}"


def simulate(
    storage: str, folder: Path, n_workers: int, n_reports: int, seconds: float, sampler: str
) -> Seen:
    """Serve simulated workers until so many reports have come.

    The driver's clock goes on by what its calls take; a worker whose message comes while the
    driver is busy waits for it.
    """
    space = make_space()
    response = Response.draw("noisy", 0, space)
    names = ["accuracy", "trainable_params"]
    controller = SearchController(
        space, names, sampler=sampler, seed=0, storage=storage, study_name="scale"
    )
    settings = SearchSettings(workers=n_workers)
    dispatcher = Dispatcher(
        controller,
        BudgetTracker(Budget.parse(f"{10 * n_reports}trials"), 0.3),
        ConfirmationStore(folder),
        settings,
    )
    dispatcher.start()
    rng, seen = np.random.default_rng(0), Seen()
    order = itertools.count()
    now = 0.0
    # (time of the next message, order, job, index of the rung, time when the worker was free)
    events: list[tuple[float, int, Job, int]] = []

    def hand_out(free_at: float) -> None:
        nonlocal now
        began = _seconds()
        job = dispatcher.next_job()
        seen.asks.append(_seconds() - began)
        assert job is not None
        now += seen.asks[-1]
        seen.waited += now - free_at
        length = seconds * rng.uniform(2 / 3, 4 / 3) * _RUNGS[0] / _RUNGS[-1]
        heapq.heappush(events, (now + length, next(order), job, 0))

    for _ in range(n_workers):
        hand_out(0.0)
    seen.waited_at_start = seen.waited
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    while len(seen.reports) < n_reports and not ended:
        at, _, job, index = heapq.heappop(events)
        now = max(now, at)
        score = response(job.candidate)
        noisy = score - 1.0 / _RUNGS[index] + 0.01 * rng.normal()
        is_last = index == len(_RUNGS) - 1
        report = RungReport(
            step=_RUNGS[index],
            score=score if is_last else noisy,
            loss=1.0 - score,
            metrics={"accuracy": score},
            seconds=0.0,
            evaluation_seconds=0.0,
            flops=0.0,
        )
        step = _RUNGS[index] - (_RUNGS[index - 1] if index else 0)
        length = seconds * step / _RUNGS[-1]
        message = RungMessage(report, is_last, {}, Activity(train=length))
        began = _seconds()
        goes_on = dispatcher.take(job, message)
        seen.reports.append(_seconds() - began)
        if len(seen.reports) % _TELL_EVERY == 0:
            print(f"{len(seen.reports):,} reports, {len(seen.asks):,} trials", file=sys.stderr)
        now += seen.reports[-1]
        seen.waited += now - at
        seen.trained += length
        if goes_on:
            following = (_RUNGS[index + 1] - _RUNGS[index]) / _RUNGS[-1]
            length = seconds * rng.uniform(2 / 3, 4 / 3) * following
            heapq.heappush(events, (now + length, next(order), job, index + 1))
            continue
        seen.decisions["complete" if is_last else "pruned"] += 1
        hand_out(now)
    return seen


if __name__ == "__main__":
    main()
