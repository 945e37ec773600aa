"""Which rung rule keeps the front for the least compute: replays of curves, one table, one JSON.

    python examples/benchmarks/pruning.py --curves recorded.json --output pruning.json

Trainings come in random order and run side by side, each at its own pace, every report going to
the pruner of a `SearchController` at once. What is reported, as a mean over arrival orders: the
share of the compute (in seconds) of training everything to its end, the share of the hypervolume
(accuracy against memory, accuracy against trainable parameters), and the loss of best accuracy.
Without `--curves` the curves are made up, new ones for every order.

`gap` is that of a search, which stops what the trials that are complete show to be hopeless;
`trusting` is the same rule where every rung is trusted, as in a `GapPruner` of one's own, and
`halving` is that rule blind to costs: successive halving on quality alone.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from curves import Curve, make_curves, read_curves, volume
from rich.console import Console
from rich.progress import track
from rich.table import Table

from autopeft import SearchController
from autopeft.costs import Price, Topology
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.searcher.controller import Decision, Trial
from autopeft.searcher.pruners.gap import GapPruner
from autopeft.searcher.space.space import SearchSpace

_RULES = ("none", "median", "asha", "halving", "trusting", "gap")
_COSTS = {"memory": "peak_memory_bytes", "params": "trainable_params"}
_JITTER = 0.1
"""Spread of the time between two reports of a training."""


@dataclass(frozen=True)
class Job:
    """One replay.

    Attributes:
        rule: Who prunes.
        cost: "memory" or "params": what accuracy is traded against.
        in_flight: Trainings side by side; 0 for all of them.
        order: Seed of the order of arrival.
        curves: File of recorded curves; "" for made-up ones.
        eta: Of the rules that have one.
        every: Report every so many recorded points.
    """

    rule: str
    cost: str
    in_flight: int
    order: int
    curves: str
    eta: float
    every: int


@dataclass(frozen=True)
class Result:
    """What became of a replay.

    Attributes:
        job: What was replayed.
        compute: Share of the seconds of training everything to its end.
        steps: The same in optimizer steps.
        volume: Share of the hypervolume.
        lost: Best accuracy of all trainings minus that of the finished ones.
    """

    job: Job
    compute: float
    steps: float
    volume: float
    lost: float


class Recorded:
    """Prices the candidates that stand for curves; anything else cannot be had.

    Args:
        curves: The curve of each layer.
    """

    def __init__(self, curves: Sequence[Curve]) -> None:
        self._curves = curves

    def price(self, candidate: Candidate) -> Price:
        """What was recorded."""
        if len(candidate.plan.specs) != 1:
            return Price(0, 0, 0.0, 0)
        curve = self._curves[candidate.plan.specs[0].layer]
        return Price(curve.params, 4 * curve.params, 1.0, curve.memory)


def main() -> None:
    """Replays, prints the table, writes the file."""
    options = _options()
    jobs = list(_jobs(options))
    results = []
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for result in track(pool.imap_unordered(replay, jobs, 8), "Replays", len(jobs)):
            results.append(result)
    if options.output:
        rows = [asdict(result) for result in results]
        settings = {**vars(options), "curves": Path(options.curves).name}
        Path(options.output).write_text(json.dumps({"settings": settings, "runs": rows}, indent=1))
    Console().print(_table(results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--curves", default="", help="JSON file of recorded curves")
    parser.add_argument("--rules", default=",".join(_RULES), help="comma-separated")
    parser.add_argument("--orders", type=int, default=100, help="arrival orders")
    parser.add_argument("--in-flight", default="0,16", help="trainings side by side; 0: all")
    parser.add_argument("--every", type=int, default=1, help="report every so many points")
    parser.add_argument("--eta", type=float, default=3.0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", default="", help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.orders, options.in_flight = 2, "4"
    for rule in options.rules.split(","):
        if rule not in _RULES:
            parser.error(f"no {rule!r}; use {', '.join(_RULES)}")
    return options


def _jobs(options: argparse.Namespace) -> Iterator[Job]:
    sides = [int(number) for number in options.in_flight.split(",")]
    for order, rule, side in itertools.product(
        range(options.orders), options.rules.split(","), sides
    ):
        for cost in _COSTS:
            yield Job(rule, cost, side, order, options.curves, options.eta, options.every)


@cache
def _curves(path: str, seed: int) -> tuple[Curve, ...]:
    return read_curves(Path(path)) if path else make_curves(seed)


@cache
def _space(n_curves: int, steps: int) -> SearchSpace:
    """Curve i is played by a plan of one adapter, in layer i."""
    return SearchSpace.from_source(
        {"methods": {"lora": {"ranks": [1]}}}, Topology(n_curves, {"attn.q": (8, 8)}), steps=steps
    )


def replay(job: Job) -> Result:
    """All trainings in one order, each until it ends or is stopped."""
    curves = _curves(job.curves, 0 if job.curves else job.order)
    rng = np.random.default_rng(job.order)
    controller = _controller(job, curves)
    waiting = [int(index) for index in rng.permutation(len(curves))]
    running: list[tuple[float, int, int]] = []  # (time of the next point, curve, which point)
    trials: dict[int, Trial] = {}
    finished: list[Curve] = []
    seconds = steps = 0.0

    def wait(now: float, index: int, point: int) -> None:
        pause = curves[index].seconds * max(1.0 + _JITTER * rng.standard_normal(), 0.1)
        heapq.heappush(running, (now + pause, index, point))

    def start(now: float) -> None:
        if waiting:
            index = waiting.pop()
            controller.enqueue(_candidate(index, curves[index]))
            trial = controller.ask()
            assert trial is not None, "something is enqueued"
            trials[index] = trial
            wait(now, index, 0)

    for _ in range(job.in_flight or len(curves)):
        start(0.0)
    while running:
        now, index, point = heapq.heappop(running)
        curve, trial = curves[index], trials[index]
        step, loss = curve.points[point]
        is_last, decision = point == len(curve.points) - 1, Decision.CONTINUE
        if is_last or (point + 1) % job.every == 0:
            decision = controller.report(trial, step, -loss)
        if is_last:
            controller.tell(trial, score=curve.accuracy)
            finished.append(curve)
        if is_last or decision is Decision.STOP:
            seconds += curve.seconds * step / curve.steps
            steps += step
            start(now)
        else:
            wait(now, index, point + 1)
    return Result(
        job,
        seconds / sum(curve.seconds for curve in curves),
        steps / sum(curve.steps for curve in curves),
        _volume(finished, curves, job.cost) / _volume(curves, curves, job.cost),
        max(c.accuracy for c in curves) - max(c.accuracy for c in finished),
    )


def _controller(job: Job, curves: Sequence[Curve]) -> SearchController:
    """With the rule for its pruner, and nothing of its own to propose first."""
    own = {"halving": GapPruner(job.eta, costs=()), "trusting": GapPruner(job.eta)}
    controller = SearchController(
        _space(len(curves), curves[0].steps),
        ["accuracy", _COSTS[job.cost]],
        sampler="random",
        pruner=own.get(job.rule, job.rule),
        seed=job.order,
        prices=Recorded(curves),
        n_baselines=0,
        n_portfolio=0,
        eta=job.eta,
    )
    # A search begins with a training without adapters, which was not recorded.
    reference = controller.ask()
    assert reference is not None
    assert reference.origin == "reference"
    controller.tell(reference, failed="not recorded")
    return controller


def _candidate(index: int, curve: Curve) -> Candidate:
    plan = AdapterPlan([LayerSpec(index, "attn.q", "lora", 1)])
    return Candidate(plan, TrainSettings(1e-3, steps=curve.steps))


def _volume(some: Sequence[Curve], curves: Sequence[Curve], cost: str) -> float:
    worst = max(getattr(curve, cost) for curve in curves) * 1.0001
    return volume([getattr(c, cost) for c in some], [c.accuracy for c in some], worst)


def _table(results: Sequence[Result]) -> Table:
    columns = [f"{what}, {cost}" for cost in _COSTS for what in ("compute", "volume", "lost")]
    table = Table("rule", "in flight", *columns, title="Means over arrival orders")
    for rule, side in dict.fromkeys((r.job.rule, r.job.in_flight) for r in _sorted(results)):
        cells = []
        for cost in _COSTS:
            mine = [
                r
                for r in results
                if (r.job.rule, r.job.in_flight, r.job.cost) == (rule, side, cost)
            ]
            cells += [
                f"{np.mean([r.compute for r in mine]):.3f}",
                f"{np.mean([r.volume for r in mine]):.4f}",
                f"{np.mean([r.lost for r in mine]):.4f}",
            ]
        table.add_row(rule, str(side or "all"), *cells)
    return table


def _sorted(results: Sequence[Result]) -> list[Result]:
    return sorted(results, key=lambda r: (_RULES.index(r.job.rule), r.job.in_flight))


if __name__ == "__main__":
    main()
