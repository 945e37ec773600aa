"""Which search finds the front soonest: every sampler on made-up landscapes, one table, one JSON.

    python examples/benchmarks/landscapes.py --output landscapes.json

A trial is a plan for 12 layers (each with a method, rank and placement of its own) and a learning
rate; a formula stands in for training it. What is reported is the share of the best known
hypervolume (true quality over log cost, of everything tried) after 25, 50, 100 and 200 trials, and
how far the LoRA that the search takes for the best falls short of the best LoRA there is: in how
many searches by no more than two standard deviations of the noise, and the median in these.
A trial that is pruned counts as far as it was trained, so `--pruners gap,none` compares pruning
with none at equal compute, where curves cross (elsewhere nothing prunes).

Samplers of autopeft are driven through `SearchController`, recipes and baselines included; those
named `stock-` are Optuna's own in the plain loop one would write, on the plain parameters.
`--prior` gives autopeft's samplers what is known of a relative of the landscape, of its opposite,
or a file of rows.
`whole-tpe` is TPE on what a practitioner would search: one method, placement and rank in the last
k layers, and the rate.
`whole-qlognehvi` (BoTorch) and `whole-primo` (NePS) search the same; see `rivals.py`.
Without `--samplers` those that need seconds an ask (gp, stock-gp and these two) are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import relatives
from best_known import Oracle, area, best_known
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from responses import BASE_QUALITY, KINDS, Response, make_space
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rivals import RIVALS, WholePlans

from autopeft import SearchController
from autopeft.plan import Candidate
from autopeft.searcher.samplers.registry import SAMPLERS
from autopeft.searcher.space.encoding import Point
from autopeft.searcher.space.initial_design import lora_choices, single_method
from autopeft.searcher.space.space import SearchSpace
from autopeft.searcher.study import distribution
from autopeft.trial import Decision, Trial

_MARKS = (15, 25, 50, 100, 200)
_RUNGS = (1 / 9, 1 / 3)
"""Shares of a training after which the pruner is asked, where curves cross."""
STOCK: Mapping[str, Callable[[int], BaseSampler]] = {
    "stock-tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "stock-nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
    "stock-gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "stock-random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "whole-tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
}
_ALL = (*SAMPLERS, *STOCK, *RIVALS)
_SLOW = ("gp", "stock-gp", *RIVALS)
_QUICK = {"landscapes": "additive", "samplers": "autopeft,stock-random", "trials": 25, "seeds": 1}


@dataclass(frozen=True)
class Job:
    """One search.

    Attributes:
        landscape: Its kind.
        sampler: Who proposes.
        pruner: Who stops trainings, where curves cross.
        seed: Of landscape, noise and sampler.
        trials: How many.
        n_rounds: Of the local search for the best known front.
        prior: What is known before; see `relatives`.
    """

    landscape: str
    sampler: str
    pruner: str
    seed: int
    trials: int
    n_rounds: int
    prior: str = "none"


@dataclass(frozen=True)
class Run:
    """What became of a job.

    Attributes:
        landscape: As of the job.
        sampler: As of the job.
        pruner: As of the job.
        seed: As of the job.
        shares: Trials -> share of the best known hypervolume.
        lora_gaps: Trials -> best LoRA minus the tuned one, in standard deviations of the noise.
        ask_seconds: Mean over the trials.
    """

    landscape: str
    sampler: str
    pruner: str
    seed: int
    shares: Mapping[int, float]
    lora_gaps: Mapping[int, float]
    ask_seconds: float


@dataclass(frozen=True)
class Tried:
    """One trial.

    Attributes:
        candidate: What was tried.
        score: What its training said; NaN if it failed or was pruned.
        work: Share of a whole training.
        ask_seconds: How long it took to think of.
    """

    candidate: Candidate
    score: float
    work: float
    ask_seconds: float


def main() -> None:
    """Searches, prints the table, writes the file."""
    options = _options()
    jobs = list(_jobs(options))
    # The yardsticks first, once each: several workers would compute the same one.
    grounds = sorted({(job.landscape, job.seed, job.n_rounds) for job in jobs})
    runs: list[Run] = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers) as pool:
        list(track(pool.imap(_prepare, grounds), "Best known fronts", len(grounds)))
        for run in track(pool.imap_unordered(_run, jobs), "Searches", len(jobs)):
            runs.append(run)
            _write(options, runs)
    Console().print(_table(runs))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ",".join(name for name in _ALL if name not in _SLOW)
    parser.add_argument("--landscapes", default=",".join(KINDS), help="comma-separated kinds")
    parser.add_argument("--samplers", default=default, help=f"of {', '.join(_ALL)}")
    parser.add_argument("--pruners", default="gap", help="comma-separated, e.g. gap,none")
    parser.add_argument(
        "--prior", default="none", help=f"{', '.join(relatives.KINDS)}, or a file of rows"
    )
    parser.add_argument("--trials", type=int, default=max(_MARKS))
    parser.add_argument("--seeds", type=int, default=3, help="how many, from --first-seed on")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", default="", help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(_QUICK)
    for given, known in ((options.landscapes, KINDS), (options.samplers, _ALL)):
        for name in given.split(","):
            if name not in known:
                parser.error(f"no {name!r}; use {', '.join(known)}")
    return options


def _jobs(options: argparse.Namespace) -> Iterator[Job]:
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    n_rounds = 5 if options.quick else 80
    samplers, landscapes = options.samplers.split(","), options.landscapes.split(",")
    for seed, sampler, landscape in itertools.product(seeds, samplers, landscapes):
        for pruner in ["none"] if sampler not in SAMPLERS else options.pruners.split(","):
            yield Job(landscape, sampler, pruner, seed, options.trials, n_rounds, options.prior)


@cache
def _space() -> SearchSpace:
    return make_space()


def _prepare(ground: tuple[str, int, int]) -> None:
    kind, seed, n_rounds = ground
    best_known(kind, seed, _space(), n_rounds)


def _run(job: Job) -> Run:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    response = Response.draw(job.landscape, job.seed, _space())
    search = _ours if job.sampler in SAMPLERS else _stock if job.sampler in STOCK else _rival
    rows = []
    for row in search(job, response):
        rows.append(row)
        if sum(each.work for each in rows) >= job.trials - 1e-9:
            break
    best = best_known(job.landscape, job.seed, _space(), job.n_rounds)
    oracle = Oracle(response, _space())
    done = np.cumsum([row.work for row in rows])
    shares, gaps = {}, {}
    for mark in (m for m in _MARKS if m <= job.trials):
        ended = [r for r in rows[: int((done < mark - 1e-9).sum()) + 1] if np.isfinite(r.score)]
        costs = [response.cost(row.candidate) for row in ended]
        truths = [response.truth(row.candidate) for row in ended]
        shares[mark] = area(costs, truths, oracle.log_range) / best
        gaps[mark] = _lora_gap(ended, response, oracle)
    seconds = float(np.mean([row.ask_seconds for row in rows]))
    return Run(job.landscape, job.sampler, job.pruner, job.seed, shares, gaps, seconds)


def _lora_gap(rows: Sequence[Tried], response: Response, oracle: Oracle) -> float:
    """Best LoRA of one rank in all layers, minus the one that the search takes for it."""
    options = {p.options.tobytes(): p.options for p in lora_choices(_space().encoder)}
    every = [(o, position) for o in options.values() for position in np.linspace(0.0, 1.0, 101)]
    _, qualities = oracle(np.array([o for o, _ in every]), np.array([p for _, p in every]))
    encoder = _space().encoder
    loras = [r for r in rows if encoder.from_candidate(r.candidate).options.tobytes() in options]
    tuned = max(loras, key=lambda row: row.score, default=None)
    found = response.truth(tuned.candidate) if tuned else BASE_QUALITY
    return (float(qualities.max()) - found) / response.traits.noise


def _ours(job: Job, response: Response) -> Iterator[Tried]:
    """A sampler of autopeft, as any evaluator would use it."""
    traits = response.traits
    known = relatives.known(job.prior, response, _space())
    controller = SearchController(
        _space(),
        ["accuracy", "latency_ms" if traits.is_measured else "trainable_params"],
        sampler=job.sampler,
        pruner=job.pruner,
        seed=job.seed,
        prior=known.prior,
        warm_start=known.warm_start,
    )
    while True:
        began = time.perf_counter()
        trial = controller.ask()
        spent = time.perf_counter() - began
        assert trial is not None, "the space is vast"
        stopped = next((share for share in _RUNGS if _stops(controller, trial, response, share)), 0)
        if stopped:
            yield Tried(trial.candidate, math.nan, stopped, spent)
        elif response.fails(trial.candidate):
            controller.tell(trial, failed="the loss diverged")
            yield Tried(trial.candidate, math.nan, 1.0, spent)
        else:
            score = response(trial.candidate)
            controller.tell(trial, score=score, measured=_measured(response, trial.candidate))
            yield Tried(trial.candidate, score, 1.0, spent)


def _stops(controller: SearchController, trial: Trial, response: Response, share: float) -> bool:
    """Whether the pruner stops a trial after a share of its steps."""
    if not response.traits.crossing:
        return False
    step = round(share * trial.train.steps)
    score = response.score_at(trial.candidate, share)
    return controller.report(trial, step, score) is Decision.STOP


def _measured(response: Response, candidate: Candidate) -> dict[str, float]:
    """The latency as a clock would tell it, 2 % off."""
    if not response.traits.is_measured:
        return {}
    rng = np.random.default_rng([int(candidate.digest[:12], 16), response.seed, 3])
    return {"latency_ms": response.cost(candidate) * float(np.exp(rng.normal(0.0, 0.02)))}


def _stock(job: Job, response: Response) -> Iterator[Tried]:
    """A sampler of Optuna's, in the loop its tutorial shows.

    The cost is told on a log scale, which is how it is judged here and easier to model.
    """
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=STOCK[job.sampler](job.seed)
    )
    rows = {name: (distribution(row), row) for name, row in _space().parameters.items()}
    while True:
        began = time.perf_counter()
        # The GP models only parameters that are always there.
        trial = study.ask({n: d for n, (d, _) in rows.items()} if "gp" in job.sampler else None)
        if job.sampler == "whole-tpe":
            candidate = _space().encoder.to_candidate(_whole(trial))
        else:
            candidate = _space().decode(trial.params or suggest(trial, rows))
        spent = time.perf_counter() - began
        if response.fails(candidate):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            yield Tried(candidate, math.nan, 1.0, spent)
            continue
        score = response(candidate)
        cost = _measured(response, candidate).get("latency_ms", response.cost(candidate))
        study.tell(trial, [score, float(np.log(max(cost, 1.0)))])
        yield Tried(candidate, score, 1.0, spent)


def _rival(job: Job, response: Response) -> Iterator[Tried]:
    """A search of another project; it may train in parts."""
    worst = (-BASE_QUALITY, Oracle(response, _space()).log_range[1])
    rival = RIVALS[job.sampler](WholePlans(_space()), worst, job.seed)
    while True:
        began = time.perf_counter()
        asked = rival.ask()
        spent = time.perf_counter() - began
        candidate = asked.candidate
        if response.fails(candidate):
            rival.tell(None)
            yield Tried(candidate, math.nan, asked.work, spent)
            continue
        score = (
            response(candidate) if asked.share == 1 else response.score_at(candidate, asked.share)
        )
        cost = _measured(response, candidate).get("latency_ms", response.cost(candidate))
        rival.tell([-score, math.log(max(cost, 1.0))])
        yield Tried(candidate, score if asked.share == 1 else math.nan, asked.work, spent)


def _whole(trial: optuna.Trial) -> Point:
    """One method, placement and rank in the last layers."""
    encoder, grid = _space().encoder, _space().grid
    method = trial.suggest_categorical("method", list(grid.methods))
    mine = [option for option in grid.options if option.method == method]
    places = list(dict.fromkeys(option.placement for option in mine))
    place = trial.suggest_categorical(f"{method}.placement", places)
    ranks = sorted({option.rank for option in mine if option.placement == place})
    rank = trial.suggest_categorical(f"{method}.{place}.rank", ranks)
    last = trial.suggest_int("last", 1, len(grid.units))
    position = trial.suggest_float("lr_position", 0.0, 1.0)
    point = single_method(encoder, method, place, rank, position, last)
    assert point is not None, "every option is legal somewhere among the last layers"
    return point


def suggest(
    trial: optuna.Trial, rows: Mapping[str, tuple[BaseDistribution, Mapping[str, Any]]]
) -> dict[str, Any]:
    """Define-by-run: rank and placement only where the layer's method has them."""
    values: dict[str, Any] = {}
    for name, (_, row) in rows.items():
        if "when" in row and values[f"{name.rpartition('.')[0]}.method"] not in row["when"]:
            continue
        if row["kind"] == "categorical":
            values[name] = trial.suggest_categorical(name, row["choices"])
        elif row["kind"] == "int":
            values[name] = trial.suggest_int(name, row["low"], row["high"], log=row["log"])
        else:
            values[name] = trial.suggest_float(name, row["low"], row["high"])
    return values


def _write(options: argparse.Namespace, runs: Sequence[Run]) -> None:
    if options.output:
        result = {"settings": vars(options), "runs": [asdict(run) for run in runs]}
        Path(options.output).write_text(json.dumps(result, indent=1))


def _table(runs: Sequence[Run]) -> Table:
    marks = [mark for mark in _MARKS if any(mark in run.shares for run in runs)]
    table = Table(
        "sampler",
        "pruner",
        "landscape",
        *(f"{mark}" for mark in marks),
        *(f"LoRA {mark}" for mark in marks),
        "s an ask",
        title="Share of the best known hypervolume; of tuned LoRAs within two deviations (median)",
    )
    ranked = sorted(runs, key=lambda run: _ALL.index(run.sampler))
    for who in dict.fromkeys((run.sampler, run.pruner) for run in ranked):
        mine = [run for run in runs if (run.sampler, run.pruner) == who]
        for kind in (k for k in KINDS if any(run.landscape == k for run in mine)):
            table.add_row(*who, kind, *_means([r for r in mine if r.landscape == kind], marks))
        table.add_row(*who, "all", *_means(mine, marks), style="bold", end_section=True)
    return table


def _means(runs: Sequence[Run], marks: Sequence[int]) -> list[str]:
    shares = [f"{np.mean([run.shares[mark] for run in runs]):.3f}" for mark in marks]
    gaps = [np.array([run.lora_gaps[mark] for run in runs]) for mark in marks]
    loras = [f"{np.mean(gap <= 2.0):.2f} ({np.median(gap):.1f})" for gap in gaps]
    return [*shares, *loras, f"{np.mean([run.ask_seconds for run in runs]):.3f}"]


if __name__ == "__main__":
    main()
