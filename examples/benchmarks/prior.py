"""Is what other models and data say of a plan worth a prior? Short real trainings of whole plans.

    python examples/benchmarks/prior.py --output prior.json

Every setting trains the same draws, each one method with one placement, rank, part of the model
and learning rate. It prints how well each setting's ranks are predicted by the other settings: what
a prior is worth on data that it has not seen. About 12 minutes on one core; one seed each, so a
single row says little, and all of them nothing about long trainings or large models.

    python examples/benchmarks/prior.py --check FILE

prints that table for measurements that are already there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from responses import TOPOLOGY
from rich.console import Console
from rich.table import Table
from scipy.special import ndtri
from scipy.stats import spearmanr

from autopeft.engine.executor import Executor
from autopeft.engine.messages import FailureMessage, Job, RungMessage
from autopeft.plan import Candidate
from autopeft.prepare import PreparedSearch, prepare
from autopeft.searcher.samplers.gp import Embedding, Features, GaussianProcess
from autopeft.searcher.space.encoding import Encoder, Point, snap
from autopeft.searcher.space.initial_design import early_units, single_method
from autopeft.searcher.space.space import SearchSpace
from autopeft.settings import SearchSettings

Array = NDArray[np.float64]

PARTS = {"all": 1.0, "last half": 0.5, "last quarter": 0.25, "early": 0.0}
"""Part of the model that a plan adapts, and its share; "early" is one early layer."""

_SMALL = {"max_train_rows": 1500, "max_validation_rows": 400, "max_test_rows": 50, "rungs": 1}
SETTINGS: Mapping[str, tuple[Mapping[str, Any], int]] = {
    "vit, digits": ({"model": "tiny-vit", "data": "digits", "steps": 60}, 56),
    "MiniLM, snippets": (
        {"model": "all-MiniLM-L6-v2", "data": "movie_snippets.csv", "steps": 40, "max_length": 64},
        42,
    ),
    "MiniLM, names": (
        {"model": "all-MiniLM-L6-v2", "data": "ner.conll", "steps": 40, "max_length": 64},
        42,
    ),
    "SmolLM2, prompts": (
        {
            "model": "SmolLM2-135M-Instruct",
            "data": "movie_sft.csv",
            "steps": 24,
            "max_length": 64,
            "batch_size": 4,
            "max_validation_rows": 100,
        },
        21,
    ),
}
"""Settings, and how many of the draws each trains."""


@dataclass(frozen=True)
class Measured:
    """A training of one of our measurements.

    Attributes:
        setting: Model and data.
        method: Name of the method.
        placement: Name of the placement.
        part: One of `PARTS`.
        rank: The rank that was asked for.
        rate: The method's learning rate.
        quality: Larger is better; None if the training failed.
    """

    setting: str
    method: str
    placement: str
    part: str
    rank: int
    rate: float
    quality: float | None


def main() -> None:
    """Trains, writes the file, prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", default="~/.cache/autopeft", help="folder of models and data")
    parser.add_argument("--settings", default=",".join(str(i) for i in range(len(SETTINGS))))
    parser.add_argument("--output", default="", help="JSON file to write")
    parser.add_argument("--check", default="", help="JSON file to print the table of")
    options = parser.parse_args()
    if options.check:
        rows = [Measured(**row) for row in json.loads(Path(options.check).read_text())]
        Console().print(_table(rows))
        return
    rows = []
    for index in map(int, options.settings.split(",")):
        name = list(SETTINGS)[index]
        began = time.monotonic()
        for row in _measure(name, Path(options.cache).expanduser()):
            rows.append(row)
            if options.output:
                lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
                Path(options.output).write_text(f"[\n{lines}\n]\n")
        Console().print(f"{name}: {time.monotonic() - began:.0f} s")
    Console().print(_table(rows))


def _measure(name: str, cache: Path) -> Iterator[Measured]:
    import torch

    torch.set_num_threads(1)
    own, n_draws = SETTINGS[name]
    paths = {key: str(cache / str(own[key])) for key in ("model", "data")}
    ready = prepare(SearchSettings.from_mapping({**_SMALL, **own, **paths}))
    executor = Executor(ready.context())
    for draw in draws(n_draws):
        point = plan_point(ready.space.encoder, draw.method, draw.placement, draw.part, draw.rank)
        if point is None:
            continue
        candidate = ready.space.encoder.to_candidate(replace(point, position=draw.position))
        quality = _train(executor, ready, candidate)
        rate = candidate.train.rate_for(draw.method)
        yield Measured(name, draw.method, draw.placement, draw.part, draw.rank, rate, quality)


@dataclass(frozen=True)
class Draw:
    """One plan and its learning-rate position."""

    method: str
    placement: str
    part: str
    rank: int
    position: float


def draws(n: int) -> list[Draw]:
    """Return the same draws in every setting: methods and parts in turn, the rest at random."""
    rng = np.random.default_rng(0)
    found = []
    parts = ("all", "early", "last half", "all", "last quarter")
    assert set(parts) == set(PARTS)
    methods = ("lora", "miss", "ia3", "dora", "oft", "rslora", "ln_tuning")
    for index in range(n):
        found.append(
            Draw(
                methods[index % len(methods)],
                str(rng.choice(["qv", "attention", "mlp", "all"])),
                parts[index % len(parts)],
                int(rng.choice([1, 2, 4, 8, 16, 32])),
                round(float(rng.uniform(0.1, 0.95)), 2),
            )
        )
    return found


def plan_point(encoder: Encoder, method: str, placement: str, part: str, rank: int) -> Point | None:
    """Return such a plan in a space, at a middle rate; None if the space has none like it."""
    grid = encoder.grid
    n = len(grid.units)
    last = max(1, round(PARTS[part] * n)) if PARTS[part] else None
    among = None if PARTS[part] else early_units(encoder)
    if method not in grid.methods or among == []:
        return None
    places = {o.placement for o in grid.options if o.method == method}
    place = placement if placement in places else None
    return single_method(encoder, method, place, rank, 0.5, last, among)


def at_rate(encoder: Encoder, point: Point, method: str, rate: float) -> Point:
    """Return a point at the position of a method's learning rate."""
    low, high = (
        encoder.to_candidate(replace(point, position=end)).train.rate_for(method)
        for end in (0.0, 1.0)
    )
    return replace(point, position=snap(math.log(rate / low) / math.log(high / low)))


def standardized(rows: Sequence[Measured]) -> Array:
    """Return normal scores of the qualities within each setting, shape (len(rows),).

    Ranks, because one diverged training would outweigh all other differences. Failed ones are last.
    """
    scores = np.zeros(len(rows))
    for name in {row.setting for row in rows}:
        mine = [i for i, row in enumerate(rows) if row.setting == name]
        values = np.array([-np.inf if rows[i].quality is None else rows[i].quality for i in mine])
        below = (values[:, None] > values[None, :]).sum(axis=1)
        equal = (values[:, None] == values[None, :]).sum(axis=1)
        scores[mine] = ndtri((below + 0.5 * equal) / len(mine))
    return scores


def as_points(rows: Sequence[Measured], space: SearchSpace) -> tuple[tuple[Point, ...], Array]:
    """Return the measurements that the space has, with their standardized qualities."""
    points, qualities = [], []
    for row, quality in zip(rows, standardized(rows), strict=True):
        point = plan_point(space.encoder, row.method, row.placement, row.part, row.rank)
        if point is not None:
            points.append(at_rate(space.encoder, point, row.method, row.rate))
            qualities.append(quality)
    return tuple(points), np.array(qualities)


def _train(executor: Executor, ready: PreparedSearch, candidate: Candidate) -> float | None:
    """Return the final quality, larger is better; None for a training that failed."""
    executor.begin([Job("search", candidate, ready.prices.price(candidate), 0)])
    while True:
        message = executor.advance()[0]
        if isinstance(message, FailureMessage):
            return None
        assert isinstance(message, RungMessage)
        if message.is_last:
            quality = ready.objectives[0]
            value = message.report.metrics.get(quality.name, message.report.loss)
            return round(quality.sign() * float(value), 4) if math.isfinite(value) else None


def _predict(known: Sequence[Measured], rows: Sequence[Measured], space: SearchSpace) -> Array:
    """Return what a model of some measurements predicts for others."""
    low, high = space.cost_range()
    embedding = Embedding(space.grid, (math.log(low), math.log(high)))

    def features(points: Sequence[Point]) -> Features:
        options = np.array([point.options for point in points])
        positions = np.array([point.position for point in points])
        return embedding.features(options, positions, np.log(space.n_params(options)))

    points, qualities = as_points(known, space)
    model = GaussianProcess(embedding)
    model.fit(features(points), qualities)
    return model.predict(features(as_points(rows, space)[0]))[0]


def _table(rows: Sequence[Measured]) -> Table:
    """Return the rank correlation of each setting with what the others say."""
    space = SearchSpace.from_source("default", TOPOLOGY)
    table = Table("setting", "trainings", "failed", "rank correlation with the others' prediction")
    for name in dict.fromkeys(row.setting for row in rows):
        mine = [row for row in rows if row.setting == name]
        others = [row for row in rows if row.setting != name]
        cell = ""
        if others:
            rho = spearmanr(_predict(others, mine, space), standardized(mine)).statistic
            cell = f"{rho:+.2f}"
        failed = sum(row.quality is None for row in mine)
        table.add_row(name, str(len(mine)), str(failed), cell)
    return table


if __name__ == "__main__":
    main()
