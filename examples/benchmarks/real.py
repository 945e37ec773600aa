"""Real trainings at equal compute: MiniLM on movie snippets, against stock Optuna samplers.

    python examples/benchmarks/real.py --output real.json

Every search spends the same number of priced training FLOPs (`--full-trials` trainings of the
largest plan's cost at most); what is pruned leaves compute for more trials. The front is chosen on
validation; its hypervolume (accuracy over log trainable parameters) is taken on the test split,
which no search saw. Reported at a quarter, half and all of the compute, mean over seeds. Stock
samplers run in the plain loop one would write: plain parameters, no pruning, no recipes. They get
the learning-rate ranges of the methods, which a user would have to find first.

    python examples/benchmarks/real.py --samplers autopeft --granularities model,group:3,layer,site

compares what shares one choice: the whole model, three blocks, a block, or a single site.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from hypervolume import hypervolume
from landscapes import STOCK, suggest
from rich.console import Console
from rich.table import Table

from autopeft import SearchController
from autopeft.costs import Price
from autopeft.engine.executor import Executor
from autopeft.engine.job_execution import JOB_ERRORS, JobExecution
from autopeft.engine.messages import FailureMessage, Job, RungMessage
from autopeft.plan import Candidate
from autopeft.preparing.prepare import prepare
from autopeft.preparing.prepared import PreparedSearch
from autopeft.searcher.controller import Decision
from autopeft.searcher.space.space import SearchSpace
from autopeft.searcher.study import distribution
from autopeft.settings import SearchSettings
from autopeft.utils.pareto import non_dominated

SETTINGS = {
    "model": "~/.cache/autopeft/all-MiniLM-L6-v2",
    "data": "~/.cache/autopeft/movie_snippets.csv",
    "max_train_rows": 2000,
    "max_validation_rows": 400,
    "max_test_rows": 1000,
    "max_length": 64,
    "steps": 75,
    "rung_rows": 200,
}
_SHARES = (0.25, 0.5, 1.0)
_FLOOR = 0.5
"""Accuracy of a guess: what is worse adds nothing."""

_EXECUTOR: Executor | None = None
_EXECUTION: JobExecution | None = None
_READY: PreparedSearch | None = None
_FULL = 0


@dataclass(frozen=True)
class Search:
    """One search: who proposes, what shares one choice, with which seed."""

    sampler: str
    granularity: str
    seed: int

    @property
    def name(self) -> str:
        """As the table shows it."""
        return " ".join(filter(None, (self.sampler, self.granularity)))


@dataclass(frozen=True)
class Spent:
    """One trial.

    Attributes:
        flops: Compute of the search up to its end.
        seconds: Wall-clock time of the search up to its end; scoring the test split not counted.
        params: Trainable parameters.
        validation: Accuracy; None if it was pruned or failed.
        test: The same on the test split.
    """

    flops: float
    seconds: float
    params: int
    validation: float | None
    test: float | None


def main() -> None:
    """Searches, prints the table, writes the file."""
    options = _options()
    ready = prepare(SearchSettings.from_mapping({**SETTINGS, "space": options.space}))
    searches = [
        Search(*triple)
        for triple in itertools.product(
            options.samplers.split(","), options.granularities.split(","), range(options.seeds)
        )
    ]
    searches.sort(key=lambda search: search.seed)
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(
        options.workers, initializer=load, initargs=(ready, options.full_trials)
    ) as pool:
        for search, trials in pool.imap_unordered(_run, searches):
            rows.append(
                {
                    "name": search.name,
                    **asdict(search),
                    "trials": [asdict(trial) for trial in trials],
                }
            )
            if options.output:
                content = {"settings": ready.settings.to_mapping(), "searches": rows}
                Path(options.output).write_text(json.dumps(content, indent=1))
    Console().print(_table(rows, ready, options.full_trials))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samplers", default="autopeft,stock-tpe,stock-nsga2,stock-random")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--full-trials", type=int, default=24, help="compute, in full trainings")
    parser.add_argument("--space", default="default")
    parser.add_argument("--granularities", default="", help="several; default: the space's own")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", default="", help="JSON file to write")
    return parser.parse_args()


def load(ready: PreparedSearch, full_trials: int) -> None:
    import torch

    global _EXECUTOR, _READY, _FULL
    torch.set_num_threads(1)
    _EXECUTOR, _READY, _FULL = Executor(ready.context()), ready, full_trials


def _space(search: Search) -> SearchSpace:
    """The space of a search, with its granularity."""
    assert _READY is not None
    space = _READY.space
    if not search.granularity:
        return space
    source = replace(space.source, granularity=search.granularity)
    return SearchSpace(source, space.topology, space.base)


def _limit(ready: PreparedSearch, full_trials: int) -> float:
    """FLOPs of so many trainings of the most expensive LoRA baseline."""
    most_expensive = max(ready.prices.price(c).train_flops for c in ready.space.baselines())
    return full_trials * most_expensive


def _run(search: Search) -> tuple[Search, list[Spent]]:
    assert _READY is not None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    loop = _stock(search) if search.sampler in STOCK else ours(search)
    limit, trials = _limit(_READY, _FULL), []
    for trial in loop:
        trials.append(trial)
        if trial.flops >= limit:
            break
    return search, trials


def ours(search: Search) -> Iterator[Spent]:
    assert _READY is not None
    controller = SearchController(
        _space(search),
        _READY.objectives,
        sampler=search.sampler,
        seed=search.seed,
        prices=_READY.prices,
        eta=float(_READY.settings.eta),
    )
    flops = seconds = 0.0
    began = time.perf_counter()
    while (trial := controller.ask()) is not None:
        score = None
        for message in _train(trial.candidate, search.seed):
            if isinstance(message, FailureMessage):
                controller.tell(trial, failed=message.reason)
                break
            share = message.report.step / trial.candidate.train.steps
            if message.is_last:
                score = message.report.metrics["accuracy"]
                controller.tell(trial, score=score)
            decision = controller.report(trial, message.report.step, message.report.score)
            if message.is_last or decision is Decision.STOP:
                flops += trial.costs.train_flops * share
                break
        seconds += time.perf_counter() - began
        yield _spent(flops, seconds, trial.costs, score)
        began = time.perf_counter()


def _stock(search: Search) -> Iterator[Spent]:
    assert _READY is not None
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=STOCK[search.sampler](search.seed)
    )
    space = _space(search)
    rows = {name: (distribution(row), row) for name, row in space.parameters.items()}
    flops = seconds = 0.0
    began = time.perf_counter()
    while True:
        trial = study.ask({n: d for n, (d, _) in rows.items()} if "gp" in search.sampler else None)
        candidate = space.decode(trial.params or suggest(trial, rows))
        price = _READY.prices.price(candidate)
        message = list(_train(candidate, search.seed))[-1]
        if isinstance(message, FailureMessage):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        accuracy = message.report.metrics["accuracy"]
        study.tell(trial, [accuracy, float(np.log(price.trainable_params))])
        flops += price.train_flops
        seconds += time.perf_counter() - began
        yield _spent(flops, seconds, price, accuracy)
        began = time.perf_counter()


def _train(candidate: Candidate, seed: int) -> Iterator[RungMessage | FailureMessage]:
    """Its messages, as a worker of a search would send them."""
    global _EXECUTION
    assert _EXECUTOR is not None
    assert _READY is not None
    if _EXECUTION is not None:
        _EXECUTION.close()
    costs = _READY.prices.price(candidate)
    execution = _EXECUTION = JobExecution(_EXECUTOR, Job("search", candidate, costs, seed))
    while True:
        try:
            message = execution.advance()
        except JOB_ERRORS as error:
            yield execution.failure(error)
            return
        assert isinstance(message, RungMessage)
        yield message
        if message.is_last:
            return


def _spent(flops: float, seconds: float, price: Price, validation: float | None) -> Spent:
    """The trial that has just ended; the test split is scored only if it was trained to the end."""
    test = None
    if validation is not None:
        assert _EXECUTION is not None
        test = _EXECUTION.start()[1].evaluate("test").metrics["accuracy"]
    return Spent(flops, seconds, price.trainable_params, validation, test)


def area(trials: Sequence[Mapping[str, Any]], low: float, high: float) -> float:
    """Hypervolume on the test split of the front chosen on validation."""
    done = [t for t in trials if t["validation"] is not None]
    if not done:
        return 0.0
    chosen = non_dominated(np.array([[t["validation"], -np.log(t["params"])] for t in done]))
    scale = np.log(high / low)
    points = [
        [t["test"] - _FLOOR, 1.0 - np.log(t["params"] / low) / scale]
        for t, is_chosen in zip(done, chosen, strict=True)
        if is_chosen and t["test"] > _FLOOR and t["params"] < high
    ]
    return hypervolume(np.array(points), np.zeros(2)) if points else 0.0


def _table(rows: Sequence[Mapping[str, Any]], ready: PreparedSearch, full_trials: int) -> Table:
    low, high = ready.space.cost_range()
    limit = _limit(ready, full_trials)
    table = Table("search", *(f"{s:.0%} of compute" for s in _SHARES), "trials", "best on test")
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row["trials"] for row in rows if row["name"] == name]
        cells = []
        for share in _SHARES:
            areas = [
                area([t for t in trials if t["flops"] <= share * limit * 1.02], low, high)
                for trials in mine
            ]
            cells.append(f"{np.mean(areas):.4f} ±{np.std(areas) / len(areas) ** 0.5:.4f}")
        best = np.mean([_best(trials) for trials in mine])
        n_trials = np.mean([len(trials) for trials in mine])
        table.add_row(name, *cells, f"{n_trials:.0f}", f"{best:.3f}")
    return table


def _best(trials: Sequence[Mapping[str, Any]]) -> float:
    """Test accuracy of the trial that was best on validation."""
    done = [t for t in trials if t["validation"] is not None]
    return float(max(done, key=lambda t: t["validation"])["test"])


if __name__ == "__main__":
    main()
