"""Is what other models and data say of a plan worth a prior? Short real trainings of whole plans.

    python examples/benchmarks/prior.py --output rows.json

Every setting trains the same draws, each one method with one placement, rank, part of the model
and learning rate. It prints how well each setting's ranks are predicted by the other settings: what
a prior is worth on data that it has not seen. About 20 minutes on one core; one seed each, so a
single row says little, and all of them nothing about long trainings or large models. The file is
one that the setting `prior` takes.

    python examples/benchmarks/prior.py --check examples/benchmarks/prior.json

prints that table for measurements that are already there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from responses import TOPOLOGY
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from autopeft.engine.executor import Executor
from autopeft.engine.messages import FailureMessage, Job, RungMessage
from autopeft.plan import Candidate
from autopeft.preparing.prepare import prepare
from autopeft.preparing.prepared import PreparedSearch
from autopeft.searcher.samplers.gp import Embedding, GaussianProcess, log_params
from autopeft.searcher.samplers.prior import PriorRow, normal_scores, point_of, read_prior
from autopeft.searcher.space.encoding import Encoder, Point
from autopeft.searcher.space.initial_design import early_units, single_method
from autopeft.searcher.space.space import SearchSpace
from autopeft.settings import SearchSettings
from autopeft.utils.serialize import to_plain

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


def main() -> None:
    """Trains, writes the file, prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", default="~/.cache/autopeft", help="folder of models and data")
    parser.add_argument("--settings", default=",".join(str(i) for i in range(len(SETTINGS))))
    parser.add_argument("--output", default="", help="JSON file to write")
    parser.add_argument("--check", default="", help="JSON file to print the table of")
    options = parser.parse_args()
    if options.check:
        Console().print(_table(read_prior(options.check)))
        return
    rows: list[PriorRow] = []
    for index in map(int, options.settings.split(",")):
        name = list(SETTINGS)[index]
        began = time.monotonic()
        for row in _measure(name, Path(options.cache).expanduser()):
            rows.append(row)
            if options.output:
                lines = ",\n".join(json.dumps(to_plain(row)) for row in rows)
                Path(options.output).write_text(f"[\n{lines}\n]\n")
        Console().print(f"{name}: {time.monotonic() - began:.0f} s")
    Console().print(_table(rows))


def _measure(name: str, cache: Path) -> Iterator[PriorRow]:
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
        roles = tuple(dict.fromkeys(spec.role for spec in candidate.plan.specs))
        depth = _depth(ready.space.encoder, draw.part)
        yield PriorRow(name, draw.method, roles, candidate.plan.specs[0].rank, quality, depth, rate)


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


def _depth(encoder: Encoder, part: str) -> tuple[float, float]:
    """Return a part of the model as depths from 0 to 1."""
    if PARTS[part]:
        return (1.0 - PARTS[part], 1.0)
    n = len(encoder.grid.units)
    return (round(early_units(encoder)[0] / n, 3), round((early_units(encoder)[0] + 1) / n, 3))


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


def _predict(known: Sequence[PriorRow], rows: Sequence[PriorRow], space: SearchSpace) -> float:
    """Return the rank correlation of some measurements with what a model of others predicts."""
    low, high = space.cost_range()
    embedding = Embedding(space.grid, (math.log(low), math.log(high)))
    model = GaussianProcess(embedding)
    points, qualities = _placed(known, space)
    model.fit(embedding.of(points, space), qualities)
    points, qualities = _placed(rows, space)
    mean, _ = model.predict(embedding.of(points, space))
    return float(spearmanr(mean, qualities).statistic)


def _placed(rows: Sequence[PriorRow], space: SearchSpace) -> tuple[list[Point], Array]:
    """Return the rows that the space has as points, with their standardized qualities."""
    placed = [
        (point_of(row, space), quality)
        for row, quality in zip(rows, normal_scores(rows), strict=True)
    ]
    return [p for p, _ in placed if p], np.array([quality for p, quality in placed if p])


def _table(rows: Sequence[PriorRow]) -> Table:
    """Return the rank correlation of each setting with what the others say."""
    space = SearchSpace.from_source("default", TOPOLOGY)
    table = Table("setting", "trainings", "failed", "others' prediction", "size alone")
    for name in dict.fromkeys(row.setting for row in rows):
        mine = [row for row in rows if row.setting == name]
        others = [row for row in rows if row.setting != name]
        points, qualities = _placed(mine, space)
        size = spearmanr(log_params(points, space), qualities).statistic
        failed = sum(row.quality is None for row in mine)
        told = f"{_predict(others, mine, space):+.2f}" if others else ""
        table.add_row(name, str(len(mine)), str(failed), told, f"{size:+.2f}")
    return table


if __name__ == "__main__":
    main()
