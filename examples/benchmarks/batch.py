"""Smaller batches on a small budget: do they keep the order of plans, and what do they take?

    python examples/benchmarks/batch.py --output batch.json

The first starts of a search and random draws are trained with 16 rows and 75 steps (digits: 200),
with two seeds: the truth. Then each way of training less (rows a step x steps) trains them with
other seeds. Reported for each way: rank correlation of its losses with the true ones, the true loss
of the plan that it finds best (beside the best there is), its own mean loss over the better half,
and seconds a training, without scoring. What the file has is not trained again. `--powers 0,0.5`
also scales the rates by (rows / 16)^power.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from autopeft.engine.loaded_model import LoadedModel
from autopeft.errors import TrainingFailure
from autopeft.models.attach import attach
from autopeft.plan import Candidate, TrainSettings
from autopeft.preparing.prepare import prepare
from autopeft.preparing.prepared import PreparedSearch
from autopeft.settings import SearchSettings
from autopeft.training.trainer import Trainer
from autopeft.utils.ranks import rank_correlation

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "snippets": {
        "model": "~/.cache/autopeft/all-MiniLM-L6-v2",
        "data": "~/.cache/autopeft/movie_snippets.csv",
        "max_train_rows": 2000,
        "max_validation_rows": 400,
        "max_length": 64,
    },
    "digits": {"model": "~/.cache/autopeft/tiny-vit", "data": "~/.cache/autopeft/digits"},
}


_ROWS = 16


@dataclass(frozen=True)
class Way:
    """How plans are trained."""

    rows: int
    steps: int
    power: float = 0.0

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"{self.rows} x {self.steps}" + (f", rates ^{self.power:g}" if self.power else "")

    def train(self, train: TrainSettings) -> TrainSettings:
        """Return the settings of a candidate that is trained so."""
        factor = (self.rows / _ROWS) ** self.power
        return replace(
            train,
            learning_rate=train.learning_rate * factor,
            method_rates=tuple((name, rate * factor) for name, rate in train.method_rates),
            batch_size=self.rows,
            steps=self.steps,
        )


TRUTH = {"snippets": Way(16, 75), "digits": Way(16, 200)}
_FIRST_TRUE_SEED = 100
_GUESS = {"snippets": 0.7, "digits": 2.3}
"""Loss of a guess: how far a training diverges beyond it is not compared."""


def main() -> None:
    """Trains what the file lacks, adding to it; prints the table."""
    options = _options()
    torch.set_num_threads(1)
    ready = prepare(SearchSettings.from_mapping(dict(SETTINGS[options.data])))
    base = LoadedModel(ready.context())
    candidates = _candidates(ready, options.plans)
    ways = _ways(options.ways, options.powers)
    output = Path(options.output)
    done: list[dict[str, Any]] = json.loads(output.read_text()) if output.exists() else []
    known = {(Way(r["rows"], r["steps"], r["power"]), r["seed"], r["plan"]) for r in done}
    wanted = [(TRUTH[options.data], seed) for seed in _true_seeds(options)]
    wanted += [(way, seed) for seed in range(options.seeds) for way in ways]
    for way, seed in wanted:
        for plan, candidate in enumerate(candidates):
            if (way, seed, plan) not in known:
                loss, seconds = _train(base, candidate, way, seed)
                row = {"seed": seed, "plan": plan, "loss": loss, "seconds": seconds}
                done.append({**asdict(way), **row})
                output.write_text(json.dumps(done, indent=1))
    Console().print(_table(done, ways, options))


def _true_seeds(options: argparse.Namespace) -> range:
    return range(_FIRST_TRUE_SEED, _FIRST_TRUE_SEED + options.true_seeds)


def _ways(pairs: str, powers: str) -> list[Way]:
    return [
        Way(rows, steps, power)
        for rows, steps in (map(int, pair.split("x")) for pair in pairs.split(","))
        for power in map(float, powers.split(","))
        if power == 0.0 or rows < _ROWS
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="snippets", choices=tuple(SETTINGS))
    parser.add_argument("--plans", type=int, default=14)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--true-seeds", type=int, default=2)
    parser.add_argument("--ways", default="16x25,8x50,8x25,4x50,16x50")
    parser.add_argument("--powers", default="0")
    parser.add_argument("--output", default="batch.json", help="JSON file to go on with")
    return parser.parse_args()


def _candidates(ready: PreparedSearch, n: int) -> list[Candidate]:
    rng = np.random.default_rng(0)
    starts = [*ready.space.baselines(4), *ready.space.portfolio(4)][:n]
    return [*starts, *(ready.space.sample_stratified(rng) for _ in range(n - len(starts)))]


def _train(base: LoadedModel, candidate: Candidate, way: Way, seed: int) -> tuple[float, float]:
    """Return validation loss and the seconds of the training's steps."""
    candidate = Candidate(candidate.plan, way.train(candidate.train))
    with attach(base.backbone, candidate, seed=seed) as attached:
        setup = base.setup_above(candidate.plan.lowest_layer)
        trainer = Trainer(attached, setup, candidate.train, seed=seed)
        try:
            trainer.train_to(way.steps)
        except TrainingFailure:
            return 9.0, trainer.train_seconds
        return trainer.evaluate("validation").loss, trainer.train_seconds


def _table(done: list[dict[str, Any]], ways: list[Way], options: argparse.Namespace) -> Table:
    def column(key: str, way: Way, seed: int) -> NDArray[np.float64]:
        found = [r for r in done if r["seed"] == seed and {**r, **asdict(way)} == r]
        return np.array([r[key] for r in sorted(found, key=lambda r: r["plan"])][: options.plans])

    table = Table("rows x steps", "correlation", "its best, truly", "mean loss, better half", "s")
    truth, guess = TRUTH[options.data], _GUESS[options.data]
    true = np.mean([column("loss", truth, seed) for seed in _true_seeds(options)], axis=0)
    half = np.argsort(true)[: len(true) // 2]
    for way, seeds in (
        (truth, _true_seeds(options)),
        *((way, range(options.seeds)) for way in ways),
    ):
        losses = np.array([column("loss", way, seed) for seed in seeds])
        table.add_row(
            way.name + (" (truth)" if seeds.start else ""),
            ", ".join(f"{rank_correlation(row, true):.2f}" for row in losses),
            ", ".join(f"{true[row.argmin()]:.3f}" for row in losses),
            f"{np.minimum(losses, guess)[:, half].mean():.4f}",
            f"{np.mean([column('seconds', way, seed) for seed in seeds]):.2f}",
        )
    return table


if __name__ == "__main__":
    main()
