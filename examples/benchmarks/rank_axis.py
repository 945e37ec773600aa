"""The rank axis from one training: hypervolume of cuts against smaller trainings of equal compute.

    python examples/benchmarks/rank_axis.py --output ranks.json

A LoRA of rank 16 on every linear module is trained once, and each row of the first table makes its
front of that compute:

- no cut: the LoRA alone
- uniform cut: also at half, a quarter and an eighth of its rank, nearest in the Frobenius norm
- global cut: also at the same totals of parameters, by one cut through all singular values
- global cut, shared: the same, at the ranks that the first seed decides, as in a search
- nested: trained with a random prefix of the ranks at each step; also its prefixes
- direct: ranks 16, 8, 4 and 2 are trained, each for a quarter of the steps
- direct, 4 times the compute: the same for all steps (`--ceiling`)

Fronts are chosen on validation, and their hypervolume (accuracy over log trainable parameters) is
taken on the test split. The second table is what the activation cache saves of scoring a LoRA and
its cuts there, from an empty cache on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypervolume import hypervolume
from rich.console import Console
from rich.table import Table

from autopeft import methods
from autopeft.confirm.finalists import CUT_DIVISORS
from autopeft.engine.loaded_model import LoadedModel
from autopeft.models.attach import Attached, attach
from autopeft.models.method_hooks import ADAPTER_NAME
from autopeft.models.rank_cut import TrainedLora
from autopeft.plan import AdapterPlan, Candidate, LayerSpec, TrainSettings
from autopeft.preparing.prepare import prepare
from autopeft.preparing.prepared import PreparedSearch
from autopeft.settings import SearchSettings
from autopeft.training.acceleration import NO_ACCELERATION
from autopeft.training.trainer import Trainer
from autopeft.utils.pareto import non_dominated

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "snippets": {
        "model": "~/.cache/autopeft/all-MiniLM-L6-v2",
        "data": "~/.cache/autopeft/movie_snippets.csv",
        "max_train_rows": 2000,
        "max_validation_rows": 400,
        "max_test_rows": 500,
        "max_length": 64,
        "steps": 75,
    },
    "digits": {
        "model": "~/.cache/autopeft/tiny-vit",
        "data": "~/.cache/autopeft/digits",
        "steps": 300,
    },
}
RANK = 16
_RANKS = (RANK, *(RANK // divisor for divisor in CUT_DIVISORS))
_FLOOR = {"snippets": 0.5, "digits": 0.1}
"""Accuracy of a guess: what is worse adds nothing."""

Point = tuple[int, float, float]
"""Trainable parameters, accuracy on validation and on test."""


class Bench:
    """One data set's trainings.

    Attributes:
        shared: The cuts that the first seed's training decided.
    """

    def __init__(self, name: str) -> None:
        torch.set_num_threads(1)
        self.ready: PreparedSearch = prepare(SearchSettings.from_mapping(dict(SETTINGS[name])))
        self.base = LoadedModel(self.ready.context())
        self.shared: tuple[AdapterPlan, ...] = ()
        topology = self.ready.prices.topology
        self.sites = [
            (layer, role)
            for layer in range(topology.n_layers)
            for role in methods.LINEAR_ROLES
            if topology.shape(layer, role)
        ]
        rate, head_rate = (
            float(np.sqrt(np.prod(methods.learning_rate_range(name)))) for name in ("lora", "head")
        )
        self.train = TrainSettings(
            rate, method_rates=(("lora", rate), ("head", head_rate)), steps=self.ready.plan.steps
        )

    @property
    def has_cache(self) -> bool:
        """Whether hidden states can be cached: those of tokens."""
        return self.base.setup.data.train.has_tokens

    def plan(self, rank: int, *, lowest: int = 0) -> AdapterPlan:
        """One rank at every site from a layer on."""
        return AdapterPlan(
            LayerSpec(*site, "lora", rank) for site in self.sites if site[0] >= lowest
        )

    def trainer(self, attached: Attached, seed: int) -> Trainer:
        candidate = attached.candidate
        setup = self.base.setup_above(candidate.plan.lowest_layer)
        return Trainer(
            attached, setup, candidate.train, seed=seed, flops_per_step=1.0, rung_rows=200
        )

    def point(self, trainer: Trainer) -> Point:
        candidate = trainer.attached.candidate
        scores = (
            trainer.evaluate("validation").metrics["accuracy"],
            trainer.evaluate("test", precision="fp32").metrics["accuracy"],
        )
        return self.ready.prices.price(candidate).trainable_params, *scores

    def cut(
        self, plan: AdapterPlan, seed: int, fill: Callable[[Attached], None], steps: int
    ) -> Point:
        candidate = Candidate(plan, replace(self.train, steps=steps))
        with attach(self.base.backbone, candidate, seed=seed) as attached:
            fill(attached)
            return self.point(self.trainer(attached, seed))

    def trained(self, rank: int, steps: int, seed: int) -> Point:
        candidate = Candidate(self.plan(rank), replace(self.train, steps=steps))
        with attach(self.base.backbone, candidate, seed=seed) as attached:
            trainer = self.trainer(attached, seed)
            trainer.train_to(steps)
            return self.point(trainer)

    def run(self, seed: int, *, ceiling: bool) -> dict[str, list[Point]]:
        """Every row's points for one seed."""
        steps = self.train.steps
        with attach(
            self.base.backbone, Candidate(self.plan(RANK), self.train), seed=seed
        ) as attached:
            trainer = self.trainer(attached, seed)
            trainer.train_to(steps)
            whole = self.point(trainer)
            lora = TrainedLora(attached)
        own = lora.cuts(CUT_DIVISORS)
        self.shared = self.shared or own
        found = {
            "no cut": [whole],
            "uniform cut": [
                whole,
                *(self.cut(self.plan(r), seed, lora.cut_into, steps) for r in _RANKS[1:]),
            ],
            "global cut": [whole, *(self.cut(p, seed, lora.cut_into, steps) for p in own)],
            "global cut, shared": [
                whole,
                *(self.cut(p, seed, lora.cut_into, steps) for p in self.shared),
            ],
            "nested": self.nested(seed),
            "direct": [self.trained(rank, steps // len(_RANKS), seed) for rank in _RANKS],
        }
        if ceiling:
            smaller = [self.trained(rank, steps, seed) for rank in _RANKS[1:]]
            found["direct, 4 times the compute"] = [whole, *smaller]
        return found

    def nested(self, seed: int) -> list[Point]:
        """Train with a random prefix of the ranks at each step; score each prefix."""
        draws, prefix = np.random.default_rng(seed), [RANK]

        def keep_prefix(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output * (torch.arange(RANK) < prefix[0])

        candidate = Candidate(self.plan(RANK), self.train)
        with attach(self.base.backbone, candidate, seed=seed) as attached:
            layers = {p: layer for part in attached.parts for p, layer in part.layers.items()}
            hooks = [
                layer.lora_A[ADAPTER_NAME].register_forward_hook(keep_prefix)  # type: ignore[union-attr, operator, index]
                for layer in layers.values()
            ]
            trainer = self.trainer(attached, seed)
            for step in range(1, self.train.steps + 1):
                prefix[0] = int(draws.choice(_RANKS))
                trainer.train_to(step)
            points = []
            for rank in _RANKS:
                prefix[0] = rank
                n_params = self.ready.prices.price(Candidate(self.plan(rank), self.train))
                points.append((n_params.trainable_params, *self.point(trainer)[1:]))
            for hook in hooks:
                hook.remove()
        return points

    def scoring_seconds(self, lowest: int) -> tuple[float, float]:
        """CPU seconds to score a LoRA and its cuts on the test split: plain, and with the cache."""
        candidate = Candidate(self.plan(RANK, lowest=lowest), self.train)
        with attach(self.base.backbone, candidate, seed=0) as attached:
            for part in attached.parts:
                for layer in part.layers.values():
                    torch.nn.init.normal_(layer.lora_B[ADAPTER_NAME].weight)  # type: ignore[union-attr, operator, index, arg-type]
            lora = TrainedLora(attached)
        seconds = []
        for is_cached in (False, False, True):  # The first pass finds kernels.
            total = 0.0
            for plan in (candidate.plan, *lora.cuts(CUT_DIVISORS)):
                with attach(self.base.backbone, Candidate(plan, self.train), seed=0) as attached:
                    lora.cut_into(attached)
                    trainer = self.trainer(attached, 0)
                    if not is_cached:
                        trainer.setup = replace(
                            trainer.setup, cache=NO_ACCELERATION, fp32_cache=NO_ACCELERATION
                        )
                    began = time.process_time()
                    trainer.evaluate("test", precision="fp32")
                    total += time.process_time() - began
            seconds.append(total)
        return seconds[1], seconds[2]


def area(points: list[Point], low: float, high: float, floor: float) -> float:
    """Hypervolume on the test split of the front chosen on validation."""
    chosen = non_dominated(np.array([[valid, -np.log(params)] for params, valid, _ in points]))
    scale = np.log(high / low)
    front = [
        [test - floor, 1.0 - np.log(params / low) / scale]
        for (params, _, test), is_chosen in zip(points, chosen, strict=True)
        if is_chosen and test > floor
    ]
    return hypervolume(np.array(front), np.zeros(2)) if front else 0.0


def main() -> None:
    """Trains, prints the tables, writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="snippets,digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="of a full training")
    parser.add_argument("--ceiling", action="store_true", help="train the smaller ranks in full")
    parser.add_argument("--output", default="", help="JSON file to write")
    options = parser.parse_args()
    fronts = Table("front", "data", "hypervolume", *(f"1/{d}: test" for d in (1, *CUT_DIVISORS)))
    scoring = Table("data", "adapters from layer", "scoring, CPU s", "with the cache", "ratio")
    result: dict[str, Any] = {}
    for name in options.data.split(","):
        bench = Bench(name)
        if options.steps:
            bench.train = replace(bench.train, steps=options.steps)
        runs = [bench.run(seed, ceiling=options.ceiling) for seed in range(options.seeds)]
        prices = bench.ready.prices
        low, high = (
            prices.price(Candidate(bench.plan(rank), bench.train)).trainable_params * factor
            for rank, factor in ((1, 0.5), (RANK, 2.0))
        )
        for row in runs[0]:
            areas = [area(run[row], low, high, _FLOOR[name]) for run in runs]
            means = np.mean([[test for *_, test in run[row]] for run in runs], axis=0)
            error = np.std(areas) / len(areas) ** 0.5
            cells = (f"{value:.3f}" for value in means)
            fronts.add_row(row, name, f"{np.mean(areas):.4f} ±{error:.4f}", *cells)
        layers = sorted({layer for layer, _ in bench.sites}) if bench.has_cache else []
        seconds = {layer: bench.scoring_seconds(layer) for layer in layers[1:]}
        for layer, (plain, cached) in seconds.items():
            scoring.add_row(
                name, str(layer), f"{plain:.2f}", f"{cached:.2f}", f"{cached / plain:.2f}"
            )
        result[name] = {"runs": runs, "scoring": seconds}
        if options.output:
            Path(options.output).write_text(json.dumps(result, indent=1))
    Console().print(fronts)
    Console().print(scoring)


if __name__ == "__main__":
    main()
