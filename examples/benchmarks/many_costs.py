"""What many costs cost: seconds and memory of an ask, and how well measured costs are predicted.

    python examples/benchmarks/many_costs.py --output many_costs.json

1. CPU seconds of `ask` and the memory of the process, by the number of costs (made-up
   qualities, 12 blocks; each search in a process of its own);
2. root mean square error of a predicted log latency, on plans that were not told, beside the spread
   of latencies. They are made up: a fixed part, one for each site that depends on its method, one
   for the FLOPs of the adapters, and 3 % noise in what is told.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from responses import Response, make_space
from rich.console import Console
from rich.table import Table

from autopeft import SearchController
from autopeft.costs import Price, PriceTable
from autopeft.costs.objectives import objective
from autopeft.plan import AdapterPlan
from autopeft.searcher.samplers.cost_model import CostModel
from autopeft.searcher.space.space import SearchSpace
from autopeft.trial import Trial

_COSTS = (
    "trainable_params",
    "train_flops",
    "peak_memory_bytes",
    "adapter_bytes",
    "latency_ms",
    "train_seconds",
)
_NOISE = 0.03
_TOLD = (14, 30, 100)
_N_TESTED = 200


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=200, help="of each search")
    parser.add_argument("--n-costs", type=int, nargs="+", default=[1, 2, 3, 4, 6])
    parser.add_argument("--seeds", type=int, default=5, help="of the latencies")
    parser.add_argument("--output", default="", help="JSON file to write")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        jobs = [(n, options.trials) for n in options.n_costs]
        asks = pool.starmap(ask_costs, jobs, chunksize=1)
    errors = [latency_errors(n, options.seeds) for n in _TOLD]
    for title, rows in (("asks", asks), ("log latency", errors)):
        table = Table(*rows[0], title=title)
        for row in rows:
            table.add_row(*(f"{value:.3g}" for value in row.values()))
        Console().print(table)
    if options.output:
        Path(options.output).write_text(json.dumps({"asks": asks, "errors": errors}, indent=1))


def ask_costs(n_costs: int, n_trials: int) -> dict[str, float]:
    """Seconds and memory of a search over so many costs."""
    space = make_space()
    response, latency = Response.draw("additive", 0, space), Latency(space, 0)
    controller = SearchController(space, ("accuracy", *_COSTS[:n_costs]), seed=0)
    rng, seconds = np.random.default_rng(0), []
    for _ in range(n_trials):
        began = time.process_time()
        trial = controller.ask()
        seconds.append(time.process_time() - began)
        assert trial is not None
        values = {"latency_ms": latency(trial.plan, trial.costs) * _noise(rng)}
        values["train_seconds"] = (5.0 + trial.costs.train_flops / 4e11) * _noise(rng)
        controller.tell(trial, score=response(trial.candidate), measured=values)
    return {
        "costs": n_costs,
        "mean s": float(np.mean(seconds)),
        "mean s of the last 20": float(np.mean(seconds[-20:])),
        "most s": max(seconds),
        "GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def latency_errors(n_told: int, n_seeds: int) -> dict[str, float]:
    """Error of the log latency predicted from so many trials, mean over seeds."""
    space = make_space()
    prices = PriceTable.from_topology(space.topology, batch_size=space.base.batch_size)
    errors, spreads = [], []
    for seed in range(n_seeds):
        rng, latency = np.random.default_rng(seed), Latency(space, seed)
        points = [space.point_sampler.stratified(rng) for _ in range(n_told + _N_TESTED)]
        trials = []
        for number, point in enumerate(points):
            candidate = space.encoder.to_candidate(point)
            price = prices.price(candidate)
            told = {"accuracy": 0.5, "latency_ms": latency(candidate.plan, price) * _noise(rng)}
            trials.append(Trial(number, candidate, price, state="complete", values=told))
        model = CostModel(space, [objective("accuracy"), objective("latency_ms")], prices)
        model.fit(trials[:n_told])
        truth = np.log([latency(t.plan, t.costs) for t in trials[n_told:]])
        predicted = model.predict(points[n_told:])[:, 0]
        errors.append(float(np.sqrt(np.mean((predicted - truth) ** 2))))
        spreads.append(float(truth.std()))
    return {"told": n_told, "error": float(np.mean(errors)), "spread": float(np.mean(spreads))}


class Latency:
    """Made-up milliseconds of a plan.

    Args:
        space: For its methods.
        seed: Of what a site costs with each of them.
    """

    def __init__(self, space: SearchSpace, seed: int) -> None:
        logs = np.random.default_rng([seed, 1]).normal(np.log(0.04), 0.6, len(space.methods))
        self._site: Mapping[str, float] = dict(
            zip(space.methods, np.exp(logs).tolist(), strict=True)
        )

    def __call__(self, plan: AdapterPlan, price: Price) -> float:
        """The truth, without noise."""
        return 4.0 + sum(self._site[s.method] for s in plan.specs) + price.inference_flops / 4e9


def _noise(rng: np.random.Generator) -> float:
    return float(np.exp(rng.normal(0.0, _NOISE)))


if __name__ == "__main__":
    main()
