"""Two uncertain qualities beside a known cost: who finds the front of all three soonest?

    python examples/benchmarks/two_qualities.py --trials 50 --seeds 3

The landscapes are those of `landscapes.py`, with forgetting as a second quality: it grows with the
rate and with the size of the adapter, more in some layers and with some methods than in others, and
it is told with noise. What is reported is the hypervolume of what was tried (true quality, log cost
and true forgetting on the scale of its square root), as a share of that of everything that any of
the samplers tried on the landscape.
`autopeft` and `random` are driven through `SearchController`, recipes and baselines included;
`stock-` samplers are Optuna's own on the plain parameters. `whole-qlognehvi` (BoTorch) and
`whole-primo` (NePS) of `rivals.py` are left out unless they are named; what PriMO trains in part
counts as far as it was trained, and a part of a training forgets as much less as it learns less.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from landscapes import STOCK, suggest
from numpy.typing import NDArray
from responses import BASE_QUALITY, KINDS, TOPOLOGY, Response, make_space
from rich.console import Console
from rich.table import Table
from rivals import RIVALS, WholePlans

from autopeft import SearchController
from autopeft.plan import Candidate
from autopeft.searcher.samplers.registry import SAMPLERS
from autopeft.searcher.space.space import SearchSpace
from autopeft.searcher.study import distribution
from autopeft.utils.pareto import hypervolume, non_dominated

Array = NDArray[np.float64]

_MARKS = (25, 50, 100)
_WORST = 1.0
"""Forgetting of the reference point, in nats."""
_NOISE = 0.004
"""Standard deviation of what one training tells of forgetting."""


@dataclass(frozen=True, eq=False)
class Forgetting:
    """How much each candidate forgets.

    Attributes:
        seed: Of the landscape.
        layers: Weight of each layer, shape (n_layers,).
        methods: Weight of each method, by name.
    """

    seed: int
    layers: Array
    methods: Mapping[str, float]

    @classmethod
    def draw(cls, seed: int, space: SearchSpace) -> Forgetting:
        """Draw that of a landscape."""
        rng = np.random.default_rng([seed, 7])
        layers = np.exp(rng.normal(0.0, 0.7, TOPOLOGY.n_layers))
        weights = np.exp(rng.normal(0.0, 0.7, len(space.methods)))
        methods = dict(zip(space.methods, weights.tolist(), strict=True))
        return cls(seed, layers / layers.sum(), methods)

    def truth(self, candidate: Candidate, response: Response) -> float:
        """Return the forgetting without noise, in nats; slightly below 0 for a small adapter."""
        total = 0.0
        for spec in candidate.plan.specs:
            _, n_params = response.site(spec.method, spec.rank, spec.layer, spec.role)
            rate = candidate.train.rate_for(spec.method)
            size = math.log1p(n_params / 2e3)
            total += self.layers[spec.layer] * self.methods[spec.method] * size * rate / 1e-3
        return 0.05 * total - 0.01 * bool(candidate.plan.specs)

    def __call__(self, candidate: Candidate, response: Response) -> float:
        """Return what a training tells, the same whenever it is asked again."""
        draw = np.random.default_rng([int(candidate.digest[:12], 16), self.seed, 4])
        return self.truth(candidate, response) + float(draw.normal(0.0, _NOISE))


@dataclass(frozen=True)
class Tried:
    """One training.

    Attributes:
        candidate: What was trained; None: in part only.
        work: Share of a whole training.
    """

    candidate: Candidate | None
    work: float = 1.0


def _ours(name: str, kind: str, seed: int, space: SearchSpace) -> Iterator[Tried]:
    response, forgetting = Response.draw(kind, seed, space), Forgetting.draw(seed, space)
    names = ["accuracy", "trainable_params", "forgetting"]
    controller = SearchController(space, names, sampler=name, seed=seed, pruner="none")
    while True:
        trial = controller.ask()
        assert trial is not None, "the space is vast"
        measured = {"forgetting": forgetting(trial.candidate, response)}
        controller.tell(trial, score=response(trial.candidate), measured=measured)
        yield Tried(trial.candidate)


def _stock(name: str, kind: str, seed: int, space: SearchSpace) -> Iterator[Tried]:
    response, forgetting = Response.draw(kind, seed, space), Forgetting.draw(seed, space)
    directions = ["maximize", "minimize", "minimize"]
    study = optuna.create_study(directions=directions, sampler=STOCK[name](seed))
    rows = {key: (distribution(row), row) for key, row in space.parameters.items()}
    fixed = {key: kind for key, (kind, _) in rows.items()}
    while True:
        trial = study.ask(fixed if name == "stock-gp" else None)
        candidate = space.decode(trial.params or suggest(trial, rows))
        cost = math.log(max(response.cost(candidate), 1.0))
        study.tell(trial, [response(candidate), cost, forgetting(candidate, response)])
        yield Tried(candidate)


def _rival(name: str, kind: str, seed: int, space: SearchSpace) -> Iterator[Tried]:
    response, forgetting = Response.draw(kind, seed, space), Forgetting.draw(seed, space)
    rival = RIVALS[name](WholePlans(space), (-BASE_QUALITY, response.log_range[1], _WORST), seed)
    while True:
        asked = rival.ask()
        score = response(asked.candidate)
        grown = 1.0
        if asked.share < 1:
            part = response.score_at(asked.candidate, asked.share)
            grown = (part - BASE_QUALITY) / (score - BASE_QUALITY)
            score = part
        cost = math.log(max(response.cost(asked.candidate), 1.0))
        rival.tell([-score, cost, grown * forgetting(asked.candidate, response)])
        yield Tried(asked.candidate if asked.share == 1 else None, asked.work)


def _until(run: Iterator[Tried], marks: Sequence[int]) -> list[list[Candidate]]:
    """Return what was trained to its end within the work of so many trainings, for each mark."""
    found: list[list[Candidate]] = []
    ended: list[Candidate] = []
    work = 0.0
    for mark in marks:
        while work < mark - 1e-9:
            row = next(run)
            work += row.work
            ended += [] if row.candidate is None else [row.candidate]
        found.append(list(ended))
    return found


def _points(candidates: Sequence[Candidate], kind: str, seed: int, space: SearchSpace) -> Array:
    """Return true values as distances from the reference point, shape (n, 3); larger is better."""
    response, forgetting = Response.draw(kind, seed, space), Forgetting.draw(seed, space)
    high = response.log_range[1]
    rows = [
        (
            response.truth(each) - BASE_QUALITY,
            high - math.log(max(response.cost(each), 1.0)),
            math.sqrt(_WORST) - math.sqrt(min(max(forgetting.truth(each, response), 0.0), _WORST)),
        )
        for each in candidates
    ]
    return np.maximum(np.array(rows), 0.0)


def _volume(points: Array) -> float:
    front = points[non_dominated(points)]
    return float(hypervolume(front, np.zeros(points.shape[1])))


def main() -> None:
    """Search and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--landscapes", default="additive,interactions,rate")
    parser.add_argument("--samplers", default="autopeft,random,stock-tpe,stock-nsga2,stock-random")
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for given, known in (
        (options.landscapes, tuple(KINDS)),
        (options.samplers, (*SAMPLERS, *STOCK, *RIVALS)),
    ):
        for name in given.split(","):
            if name not in known:
                parser.error(f"no {name!r}; use {', '.join(known)}")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space, marks = make_space(), [m for m in _MARKS if m < options.trials] + [options.trials]
    table = Table("landscape", "sampler", *(f"{m} trials" for m in marks), "s a trial")
    for kind in options.landscapes.split(","):
        found: dict[str, list[list[float]]] = {}
        seconds: dict[str, float] = {}
        for seed in range(options.seeds):
            tried: dict[str, list[Array]] = {}
            for name in options.samplers.split(","):
                began = time.perf_counter()
                search = _ours if name in SAMPLERS else _stock if name in STOCK else _rival
                run = search(name, kind, seed, space)
                tried[name] = [_points(each, kind, seed, space) for each in _until(run, marks)]
                seconds[name] = (time.perf_counter() - began) / options.trials
            best = _volume(np.concatenate([points[-1] for points in tried.values()]))
            for name, by_mark in tried.items():
                found.setdefault(name, []).append([_volume(each) / best for each in by_mark])
        for name, shares in found.items():
            means = [f"{value:.3f}" for value in np.mean(shares, axis=0)]
            table.add_row(kind, name, *means, f"{seconds[name]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
